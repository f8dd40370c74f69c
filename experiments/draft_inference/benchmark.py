# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of whole requests: the draft's time, the first token, the last one, beside dense
attention and methods that drop without a draft.

    python -m experiments.draft_inference.benchmark --config=configs/draft_inference.py:smoke
        --draft_config=configs/draft_inference.py:smoke_draft [--contexts=400] [--workdir=DIR]
    python -m experiments.draft_inference.benchmark --config=configs/draft_inference.py:paper
        --draft_config=configs/draft_inference.py:paper_draft --contexts=65536 [--layers=0]
    python -m experiments.draft_inference.benchmark --config=... --target=DIR --draft=DIR
    python -m experiments.draft_inference.benchmark --config=... --target=DIR --heads=DIR

--heads names a CP head on the target, which then drafts for itself: for methods that need only the
drafted tokens. Without checkpoints the configs' shapes are filled at random; --layers cuts a random
target, 0 to the layers that fit into the device's memory beside the draft. Prompts are random
tokens. draft_ms is part of ttft_ms; total_ms ends with the last of --new_tokens; cache_bytes are
alive in decoding, prefill_cache_bytes at most during prefill; draft_bytes are the draft's
parameters and cache; agreement is of the text with dense attention's. Rows go to benchmark.jsonl of
--workdir as they come. The last line is {"rows": [{"method": ..., "context": n, "draft_ms": x,
"ttft_ms": x, "total_ms": x, "decode_tokens_per_s": x, "requests_per_s": x, "peak_bytes": n,
"agreement": x, ...}, ...], "first_token": x, "total": x, "layers": n}: dense over the first other
method at the last context. Exit status 1 when a --require does not hold.
"""

import dataclasses
import math
import os
import pathlib
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from experiments import cli, compositions, gate
from experiments.long_context import flags as shared
from lm import hardware, prompting, setup, transformer
from lm.config import ModelConfig
from lm.draft_inference import benchmark, draft, evaluate
from lm.draft_inference.config import DraftConfig
from lm.draft_inference.methods import VOTED, WATCHING, Methods
from lm.draft_inference.proposals import Proposals
from lm.errors import UserError
from lm.long_context.benchmark import Options, random_params
from lm.progress import say

NAMES = ("first_token", "total")

cli.define_config(data=False)
config_flags.DEFINE_config_file("draft_config", help_string="FILE.py:PRESET of a random draft")
REQUIRE = gate.define(NAMES)
TARGET = flags.DEFINE_string("target", None, "workdir or Hugging Face directory")
DRAFT = flags.DEFINE_string("draft", None, "the same of the draft (default: draft.path)")
HEADS = flags.DEFINE_string("heads", None, "instead: the same of a CP head on the target")
shared.define_benchmark(benchmark.METHODS, "tokens kept", "target", "1,000 requests")


def main() -> dict[str, Any]:
    # activations of whole prompts need nearly all of the memory
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    requirements = gate.parse(REQUIRE.value, NAMES)
    config = cli.config(DraftConfig)
    options = shared.timing(config)
    if HEADS.value:
        options = _by_heads(config, options)
    drafter = _draft(config)
    model, params, valid_vocab, proposals = _target(config, options, drafter)
    if drafter is not None:
        drafter.check(model)
    methods = Methods(config.draft, drafter, proposals)
    named = evaluate.named(dataclasses.replace(config.draft, path=DRAFT.value or config.draft.path))
    if proposals is not None:
        named = proposals.name
    workdir, rows = shared.kept(config), []
    about = {
        "checkpoint": TARGET.value or "random",
        "draft": named or ("random" if drafter is not None else None),
        "device": jax.devices()[0].device_kind,
    }
    for row in benchmark.rows(model, params, methods, options, valid_vocab):
        row |= about
        if cli.FLAGS.chip_price is not None and row["requests_per_s"]:
            row["cost_per_1000_requests"] = cli.FLAGS.chip_price / 3.6 / row["requests_per_s"]
        rows.append(row)
        if workdir is not None:
            workdir.append("benchmark.jsonl", row)
    result = {
        "rows": rows,
        "first_token": benchmark.ratio(rows, "ttft_ms"),
        "total": benchmark.ratio(rows, "total_ms"),
        "layers": model.num_layers,
    }
    known = {name: math.nan if result[name] is None else result[name] for name in NAMES}
    failed = gate.failures(requirements, known)
    if failed:
        raise cli.CheckFailed(result, "; ".join(failed))
    return result


def _by_heads(config: DraftConfig, options: Options) -> Options:
    """Without the usual methods that heads cannot draft for. Raises UserError where none is left
    for them."""
    if not cli.FLAGS["methods"].present:
        kept = tuple(name for name in options.methods if name not in WATCHING)
        options = dataclasses.replace(options, methods=kept)
        say(f"--heads: {', '.join(kept)}")
    for name in options.methods:
        Methods(config.draft).check(name)
    if not set(options.methods) & {*VOTED, *WATCHING}:
        raise UserError(f"--heads: {', '.join(options.methods)} takes no draft")
    return options


def _draft(config: DraftConfig) -> draft.Draft | None:
    """A checkpoint, or a shape at random; None where the target's first layers draft, or nobody."""
    path = DRAFT.value or config.draft.path
    shape = cli.FLAGS["draft_config"].present
    if sum((bool(path), shape, bool(config.draft.layers), bool(HEADS.value))) > 1:
        raise UserError(
            "--draft, --heads, --draft_config and draft.layers each name a draft: pass one"
        )
    if path:
        return draft.load(path, dtype=cli.FLAGS.dtype)
    if not shape:
        return None
    resolved = setup.resolve(cli.config(DraftConfig, "draft_config"))
    seed = config.train.seed + 1
    return benchmark.random_draft(_typed(resolved.model), resolved.valid_vocab, seed)


def _target(
    config: DraftConfig, options: Options, drafter: draft.Draft | None
) -> tuple[ModelConfig, transformer.Params, int | None, Proposals | None]:
    """The model, its parameters, the real tokens of its vocabulary, and its own heads."""
    if TARGET.value is not None:
        if cli.FLAGS.layers is not None:
            raise UserError("--layers cuts a random target, not a checkpoint")
        path = pathlib.Path(TARGET.value)
        load = prompting.load_hf if setup.is_hf(path) else prompting.load_workdir
        speaker = load(path, dtype=cli.FLAGS.dtype)
        own = compositions.proposals(HEADS.value)(speaker) if HEADS.value else None
        return speaker.model, speaker.params, speaker.valid_vocab, own
    if HEADS.value:
        raise UserError("--heads are of a checkpoint: name it with --target")
    resolved = setup.resolve(config)
    model, layers = _typed(resolved.model), cli.FLAGS.layers
    if layers == 0:
        memory = benchmark.memory()
        tokens = max(options.contexts) + options.draws
        beside = None if drafter is None else drafter.model
        layers = benchmark.layers_that_fit(model, beside, max(options.batch_sizes), tokens, memory)
        say(f"{layers} of {model.num_layers} layers fit into {memory / hardware.GIB:.1f} GiB")
    if layers is not None:
        model = dataclasses.replace(model, num_layers=layers)
    return model, random_params(model, config.train.seed), resolved.valid_vocab, None


def _typed(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, dtype=cli.FLAGS.dtype or model.dtype)


if __name__ == "__main__":
    cli.run(main)
