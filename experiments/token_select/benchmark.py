# SPDX-License-Identifier: Apache-2.0
"""Speed of methods that read less of the cache beside dense attention: end to end, after a profile
of what attention takes of a step.

    python -m experiments.token_select.benchmark --config=configs/token_select.py:smoke
        [--checkpoint=DIR | --hf_dir=DIR] [--methods=dense,token_select,streaming_llm]
        [--contexts=4096,32768] [--batch_sizes=1,8] [--budget=2688] [--workdir=DIR]
    python -m experiments.token_select.benchmark --config=configs/token_select.py:paper_llama
        --layers=0 --contexts=1048576 [--filled]

Without a checkpoint the config's shape is filled at random; --layers cuts a random model, 0 to the
layers that fit into the device's memory with the caches. A context is the length of a prompt of
random tokens; --filled writes random keys and values into the cache instead, to time decoding where
a prompt would take too long, and rows say so. The profile times the stages of one layer at the
model's shape (rows with "stage"; --noprofile leaves it out), end-to-end rows have a "method".
ttft_ms is the time to the first token, tpot_ms_p50 and p95 are of single steps, tokens_per_s of
many in one go, prompt not counted; peak_bytes is of the larger compiled program. Rows go to
benchmark.jsonl of --workdir as they come. The last line is {"rows": [{"stage": ..., "tokens": n,
"ms": x, "bandwidth_share": x, ...}, ..., {"method": ..., "context": n, "ttft_ms": x, "tpot_ms_p50":
x, "tpot_ms_p95": x, "tokens_per_s": x, "peak_bytes": n, ...}, ...], "speedup": x}: of a step, over
dense, by the first other method at the last context. Exit status 1 when a --require does not hold
or a stage computes something else.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import flags

from experiments import cli, gate
from experiments.long_context import flags as shared
from lm import hardware, prompting, setup
from lm.benchmarks import selection_problem
from lm.config import ModelConfig
from lm.errors import UserError
from lm.long_context import benchmark
from lm.long_context.methods import DENSE
from lm.progress import say
from lm.token_select import profile
from lm.token_select.config import TokenSelectConfig
from lm.token_select.methods import OWN, Methods
from lm.transformer import Params
from ops import dispatch

NAMES = ("speedup",)
_COPIED = {"gpu": 1 << 28, "tpu": 1 << 28}  # numbers; less where memory is slower

cli.define_config(data=False)
REQUIRE = gate.define(NAMES)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of a run")
HF_DIR = flags.DEFINE_string("hf_dir", None, "Hugging Face directory")
shared.define_benchmark([DENSE, OWN], "tokens of a step", "model", "million tokens")
FILLED = flags.DEFINE_bool("filled", False, "random keys and values in place of a prompt")
PROFILE = flags.DEFINE_bool("profile", True, "stages of a layer first")
MODES = flags.DEFINE_list("modes", list(selection_problem.MODES), "of the profile: decode, chunk")


def main() -> dict[str, Any]:
    # caches of a million tokens need nearly all of the memory
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    requirements = gate.parse(REQUIRE.value, NAMES)
    config = cli.config(TokenSelectConfig)
    options = shared.timing(config, filled=FILLED.value)
    methods = Methods(config.select)
    model, made, valid_vocab = _model(config, options)
    options.policies(model, methods)  # refuses before anything is measured
    plan = _plan(config, options, model) if PROFILE.value else None
    record = _record(config)
    params, rows = made(), []

    def kept(found: Iterator[dict[str, Any]]) -> None:
        for row in found:
            rows.append(record(row))

    if plan is not None:
        kept(profile.profile(plan, model, params, options.repeats))
        for row in rows:
            if row["stage"] == "attention":
                say(profile.sentence(row))
    kept(benchmark.benchmark(model, params, methods, options, valid_vocab))
    result = {"rows": [row for row in rows if "ms" in row or "method" in row]}
    result["speedup"] = _speedup(rows)
    result["layers"] = model.num_layers
    return _checked(rows, result, requirements)


def _model(
    config: TokenSelectConfig, options: benchmark.Options
) -> tuple[ModelConfig, Callable[[], Params], int | None]:
    """The model, what makes its parameters, and the real tokens of its vocabulary."""
    paths = [path for path in (CHECKPOINT.value, HF_DIR.value) if path is not None]
    if len(paths) == 2:
        raise UserError("pass one of --hf_dir and --checkpoint")
    if paths:
        if cli.FLAGS.layers is not None:
            raise UserError("--layers cuts a random model, not a checkpoint")
        load = prompting.load_workdir if HF_DIR.value is None else prompting.load_hf
        speaker = load(pathlib.Path(paths[0]), dtype=cli.FLAGS.dtype)
        return speaker.model, lambda: speaker.params, speaker.valid_vocab
    resolved = setup.resolve(config)
    model = dataclasses.replace(resolved.model, dtype=cli.FLAGS.dtype or resolved.model.dtype)
    layers = cli.FLAGS.layers
    if layers == 0:
        tokens = max(options.batch_sizes) * (max(options.contexts) + options.draws)
        memory = _memory()
        layers = benchmark.layers_that_fit(model, config.select.shadow, tokens, memory)
        say(f"{layers} of {model.num_layers} layers fit into {memory / hardware.GIB:.1f} GiB")
    if layers is not None:
        model = dataclasses.replace(model, num_layers=layers)
    seed = config.train.seed
    return model, lambda: benchmark.random_params(model, seed), resolved.valid_vocab


def _memory() -> int:
    """Bytes that programs may use on the first device. Raises UserError where it does not say."""
    statistics = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    known = hardware.chip()
    if known is None:
        raise UserError("--layers=0: this device does not say how much memory it has")
    return known.memory


def _plan(config: TokenSelectConfig, options: benchmark.Options, model: ModelConfig) -> Any:
    return profile.plan(
        model,
        config.select,
        options.contexts,
        options.implementation,
        modes=tuple(MODES.value),
        copied=_COPIED.get(dispatch.current_platform(), 1 << 22),
    )


def _record(config: TokenSelectConfig) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Completes a row and keeps it."""
    workdir = shared.kept(config)
    about = {
        "checkpoint": CHECKPOINT.value or HF_DIR.value or "random",
        "device": jax.devices()[0].device_kind,
    }

    def record(row: dict[str, Any]) -> dict[str, Any]:
        row = row | about
        if cli.FLAGS.chip_price is not None and row.get("tokens_per_s"):
            row["cost_per_million_tokens"] = cli.FLAGS.chip_price / 3600 * 1e6 / row["tokens_per_s"]
        if workdir is not None:
            workdir.append("benchmark.jsonl", row)
        return row

    return record


def _speedup(rows: Sequence[dict[str, Any]]) -> float | None:
    others = [r for r in rows if r.get("method", DENSE) != DENSE]
    first = [r for r in others if r["method"] == others[0]["method"]]
    return first[-1]["over_dense"] if first else None


def _checked(rows, result, requirements) -> dict[str, Any]:
    """The result. Raises CheckFailed for stages that compute something else, and requirements."""
    wrong = [row for row in rows if "failed" in row and "method" not in row]
    known = {name: math.nan if result[name] is None else result[name] for name in NAMES}
    reasons = [f"{row['by']}: {row['failed']}" for row in wrong]
    reasons += gate.failures(requirements, known)
    if reasons:
        raise cli.CheckFailed(result, "; ".join(reasons))
    return result


if __name__ == "__main__":
    cli.run(main)
