# SPDX-License-Identifier: Apache-2.0
"""Decoding speed of CP heads beside plain decoding and other drafters: same target, one run.

    python -m experiments.cp_heads.benchmark --config=configs/cp_heads.py:smoke --checkpoint=DIR

DIR is a workdir or a Hugging Face directory with a head; several, separated by commas, share a
trunk, which the first one gives. --tuned=TUNED puts the choice of experiments.cp_heads.tune first,
and says so when it was made for another model, tokenizer or template. --baseline_steps=N trains, on
that trunk and with the config's data and optimiser, what the checkpoints lack: independent heads
(rank1) and a Hydra head with as many parameters as the first head. --draft_checkpoint adds a
smaller model as drafter. --chains=3 also verifies trees of drafts, --shapes times random heads at
the shapes of larger models. Prompts are beginnings of held-out texts; every sequence goes on to
--new_tokens.

draft_ms and verify_ms split a cycle: the drafter by itself, and the rest. tokens_per_s leaves out
prefill, token_ms_p50 and p95 include a visit of the host per cycle. Rows go to benchmark.jsonl of
--workdir. The last line is {"rows": [{"method": "autoregressive" | "rank1" | ..., "tokens_per_s":
x, "tokens_per_call": x, "draft_ms": x, "verify_ms": x, ...}, ...], "best": name, "speedup": x,
"over_rank1": x}: the best CP head of the first batch size and temperature over plain decoding and
over rank 1. Exit status 1 when a --require does not hold.
"""

import dataclasses
import pathlib
from typing import Any

from absl import flags

from configs import shapes
from experiments import cli, gate
from lm import prompting, tuned
from lm.config import ModelConfig, freeze
from lm.cp_heads import benchmark, checkpoints, evaluate, prompts, tune
from lm.cp_heads.baselines import DraftModel, Hydra, hydra_width, train_head, train_hydra
from lm.cp_heads.benchmark import Method
from lm.cp_heads.checkpoints import Loaded
from lm.cp_heads.config import CpConfig
from lm.cp_heads.drafters import Autoregressive, Heads, Target
from lm.errors import UserError
from lm.workdir import Workdir

NAMES = ("speedup", "over_rank1")
SHAPES = {"1b": shapes.llama_3_2_1b, "8b": shapes.llama_3_1_8b}

cli.define_config()
REQUIRE = gate.define(NAMES)
CHECKPOINT = flags.DEFINE_list("checkpoint", [], "workdirs or directories with heads")
TUNED = flags.DEFINE_string("tuned", None, "workdir of tune, or its tuned.json: that choice first")
DRAFT_CHECKPOINT = flags.DEFINE_string("draft_checkpoint", None, "workdir of a smaller model")
BASELINE_STEPS = flags.DEFINE_integer(
    "baseline_steps", 0, "train rank 1 and Hydra for so many steps; 0: no such rows", lower_bound=0
)
CHAINS = flags.DEFINE_integer("chains", 1, "also a tree of so many drafts", lower_bound=1)
BATCHES = flags.DEFINE_list("batches", ["1"], "batch sizes")
TEMPERATURES = flags.DEFINE_list("temperatures", ["0"], "0 is greedy")
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 128, "per sequence")
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 64, "at most", lower_bound=1)
GROUPS = flags.DEFINE_integer(
    "groups", 4, "batches of other prompts, decoded one after the other", lower_bound=1
)
REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs per row", lower_bound=1)
SHAPE = flags.DEFINE_list("shapes", [], "also time heads at 1b, 8b")
WORKDIR = flags.DEFINE_string("workdir", None, "also append the rows to benchmark.jsonl there")
PRICE = flags.DEFINE_float("chip_price", None, "per chip-hour: adds cost per million tokens")
cli.define_implementation()


def main() -> dict[str, Any]:
    requirements = gate.parse(REQUIRE.value, NAMES)
    config = cli.config(CpConfig)
    options = benchmark.Options(
        batches=cli.numbers("batches", BATCHES.value, int),
        temperatures=cli.numbers("temperatures", TEMPERATURES.value, float),
        new_tokens=NEW_TOKENS.value,
        groups=GROUPS.value,
        repeats=REPEATS.value,
        seed=config.train.seed,
    )
    unknown = set(SHAPE.value) - set(SHAPES)
    if unknown:
        raise UserError(f"--shapes: {', '.join(sorted(unknown))} not among {', '.join(SHAPES)}")
    loaded = _loaded(config)
    first = loaded[0]
    target = Target(
        first.model,
        config.sampling,
        implementation=cli.implementation(),
        valid_vocab=first.setup.valid_vocab,
    )
    methods = [Method("autoregressive", Autoregressive(), {}), *_methods(loaded)]
    own = dataclasses.replace(first.setup.config, data=evaluate.data_of(first, config))
    resolved = dataclasses.replace(first.setup, config=own)
    rows = benchmark.benchmark(
        target,
        first.params,
        methods,
        lambda count: prompts.held_out(resolved, PROMPT_TOKENS.value, count),
        options=options,
    )
    result = {"rows": rows, **_best(rows, methods, options)}
    for shape in SHAPE.value:
        model = freeze(SHAPES[shape]().to_dict(), ModelConfig)
        for one in loaded:
            name = f"{evaluate.name_of(one.head_config)} {shape}"
            rows.append(benchmark.head_cost(name, model, one.head_config))
    _record(rows, config)
    failed = gate.failures(requirements, result)
    if failed:
        raise cli.CheckFailed(result, "; ".join(failed))
    return result


def _loaded(config: CpConfig) -> list[Loaded]:
    """The checkpoints, which have to share a trunk."""
    found = [(path, checkpoints.load(pathlib.Path(path), config)) for path in CHECKPOINT.value]
    if TUNED.value is not None:
        choice = tune.load(pathlib.Path(TUNED.value))
        path = tune.checkpoint_of(choice)
        found.insert(0, (str(path), tune.apply(choice, checkpoints.load(path, config))))
    if not found:
        raise UserError("which heads? give --checkpoint or --tuned")
    trunk = tuned.digest(found[0][1].params)
    for path, one in found:
        if tuned.digest(one.params) != trunk:
            raise UserError(f"{path} has another trunk than {found[0][0]}")
    return [one for _, one in found]


def _methods(loaded: list[Loaded]) -> list[Method]:
    methods = []
    for one in loaded:
        own = one.head_config
        about = {"rank": own.rank, "transition": own.transition, "n": own.predicted}
        methods.append(Method(_name(own), Heads(own), one.head, about))
        chains = min(CHAINS.value, own.rank)
        if chains > 1:
            # not a point of the curves against rank, which are of single drafts
            about = about | {"transition": f"{own.transition}+tree", "chains": chains}
            methods.append(
                Method(f"{_name(own)} tree {chains}", Heads(own, chains), one.head, about)
            )
    first = loaded[0]
    if BASELINE_STEPS.value:
        methods += _trained(first, any(one.head_config.rank == 1 for one in loaded))
    if DRAFT_CHECKPOINT.value is not None:
        speaker = prompting.load_workdir(
            pathlib.Path(DRAFT_CHECKPOINT.value), dtype=first.model.dtype
        )
        length = max(first.head_config.predicted - 1, 1)
        drafter = DraftModel(speaker.model, length)
        methods.append(Method("draft_model", drafter, speaker.params, {"n": length + 1}))
    return methods


def _name(config: Any) -> str:
    return "rank1" if config.rank == 1 else evaluate.name_of(config)


def _trained(first: Loaded, has_rank1: bool) -> list[Method]:
    steps, own = BASELINE_STEPS.value, first.head_config
    methods = []
    if not has_rank1:
        config = dataclasses.replace(own, rank=1, transition="identity", draft_vocab=0)
        weights, _ = train_head(first.setup, first.params, config, steps)
        about = {"rank": 1, "transition": "identity", "n": own.predicted}
        methods.append(Method("rank1", Heads(config), weights, about))
    if own.predicted > 1:
        size = sum(x.size for x in _leaves(first.head))
        hydra = Hydra(own.predicted, hydra_width(own, first.model, size))
        weights, _ = train_hydra(first.setup, first.params, hydra, steps)
        methods.append(Method("hydra", hydra, weights, {"n": own.predicted}))
    return methods


def _leaves(tree: Any) -> list[Any]:
    return [x for value in tree.values() for x in (value.values())]


def _best(rows: list[dict[str, Any]], methods: list[Method], options: Any) -> dict[str, Any]:
    """The fastest CP head of the first setting."""
    first = [
        row
        for row in rows
        if row["batch"] == options.batches[0] and row["temperature"] == options.temperatures[0]
    ]
    speeds = {row["method"]: row["tokens_per_s"] for row in first}
    heads = {m.name for m in methods if isinstance(m.drafter, Heads) and m.drafter.config.rank > 1}
    best = max(heads or speeds.keys() - {"autoregressive"}, key=lambda name: speeds[name])
    rank1 = speeds.get("rank1", float("nan"))
    return {
        "best": best,
        "speedup": speeds[best] / speeds["autoregressive"],
        "over_rank1": speeds[best] / rank1,
    }


def _record(rows: list[dict[str, Any]], config: CpConfig) -> None:
    if PRICE.value is not None:
        for row in rows:
            if "tokens_per_s" in row:
                row["cost_per_million_tokens"] = PRICE.value / 3600 * 1e6 / row["tokens_per_s"]
    if WORKDIR.value:
        workdir = Workdir(WORKDIR.value)
        workdir.create(config)
        for row in rows:
            row = {"seed": config.train.seed, "source": config.data.source, **row}
            workdir.append("benchmark.jsonl", row)


if __name__ == "__main__":
    cli.run(main)
