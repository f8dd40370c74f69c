# SPDX-License-Identifier: Apache-2.0
"""The decoding half of a study: which methods are timed beside each other, the timing, the check of
greedy text, and what the rows come to."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lm import setup
from lm.config import ModelConfig, SamplingConfig
from lm.cp_heads import benchmark, prompts, tune, verify
from lm.cp_heads.baselines import DraftModel, Hydra
from lm.cp_heads.benchmark import Method
from lm.cp_heads.checkpoints import Loaded
from lm.cp_heads.config import StudyConfig
from lm.cp_heads.drafters import Autoregressive, Heads, Target
from lm.cp_heads.head import HeadConfig
from lm.transformer import Params

Row = dict[str, Any]
_GROUPS = 16  # batches of other prompts that a timed run decodes: acceptance differs between them
_CHECK_BATCH, _CHECK_NEW = 128, 128  # sequences and tokens of each that are compared at once
_CHECK_FILES = 1 << 20  # held-out files that their prompts come from: all
_BASELINES = ("autoregressive", "rank1", "hydra", "draft_model")


@dataclasses.dataclass(frozen=True)
class Trained:
    """The trunk and the heads on it, in memory."""

    resolved: setup.Setup
    params: Params  # float32
    heads: dict[str, tuple[HeadConfig | Hydra, Any]]

    def loaded(self, name: str, params: Params) -> Loaded:
        """One CP head with the trunk; `params` in whatever dtype they are needed."""
        config, weights = self.heads[name]
        return Loaded(self.resolved, params, config, weights)


@dataclasses.dataclass(frozen=True)
class Block:
    """Methods that are timed in one run: all share target, prompts, batch size and temperature."""

    name: str
    length: int  # P
    temperature: float
    batch: int
    methods: tuple[str, ...]  # heads by name, or of _BASELINES


def blocks(study: StudyConfig, offline: Sequence[Row]) -> list[Block]:
    """What is to be timed, from rows of acceptance: rank 1, the best CP and the best HMM beside all
    baselines; then the other ranks; then larger batches."""
    first, ranks, batches = [], [], []
    for length in study.lengths:
        best = [best_of(offline, length, kind) for kind in ("identity", study.hmm)]
        others = [
            row["head"]
            for row in offline
            if row["n"] == length and row["rank"] > 1 and row["head"] not in best
        ]
        others = tuple(dict.fromkeys(others))
        for temperature in sorted({row["temperature"] for row in offline}):
            name = f"n{length} t{temperature:g}"
            methods = ("autoregressive", "rank1", *best, "hydra", "draft_model")
            first.append(Block(f"{name} best", length, temperature, 1, methods))
            if others:
                methods = ("autoregressive", "rank1", *others)
                ranks.append(Block(f"{name} ranks", length, temperature, 1, methods))
        methods = ("autoregressive", "rank1", *best)
        batches += [
            Block(f"n{length} t0 batch{size}", length, 0.0, size, methods) for size in study.batches
        ]
    return [*first, *ranks, *batches]


def best_of(offline: Sequence[Row], length: int, transition: str) -> str:
    """The head of this length and transition, above rank 1, that drafts best over the
    temperatures."""
    found: dict[str, float] = {}
    for row in offline:
        if row["n"] == length and row["transition"] == transition and row["rank"] > 1:
            value = row["expected_tokens_per_call"] or 0.0
            found[row["head"]] = found.get(row["head"], 0.0) + value
    return max(found, key=found.__getitem__)


def finalists(study: StudyConfig, offline: Sequence[Row]) -> list[str]:
    """The best heads of every length: those whose greedy text is checked."""
    kinds = ("identity", study.hmm)
    return [best_of(offline, length, kind) for length in study.lengths for kind in kinds]


def timed(
    block: Block, trained: Trained, small: tuple[ModelConfig, Params], study: StudyConfig
) -> list[Row]:
    """The rows of a block, each with its speed over plain decoding and over rank 1.

    small: the model that drafts, where the block has it.
    """
    methods = [_method(name, block.length, trained, small) for name in block.methods]
    resolved = trained.resolved
    target = Target(resolved.model, SamplingConfig(), valid_vocab=resolved.valid_vocab)
    options = benchmark.Options(
        batches=(block.batch,),
        temperatures=(block.temperature,),
        new_tokens=study.new_tokens,
        groups=_GROUPS,
        repeats=study.repeats,
    )
    rows = benchmark.benchmark(
        target,
        trained.params,
        methods,
        lambda count: prompts.held_out(resolved, study.prompt_tokens, count),
        options=options,
    )
    rank1 = next(row["tokens_per_s"] for row in rows if row["method"] == "rank1")
    return [{**row, "over_rank1": row["tokens_per_s"] / rank1} for row in rows]


def _method(name: str, length: int, trained: Trained, small: tuple[ModelConfig, Params]) -> Method:
    if name == "autoregressive":
        return Method(name, Autoregressive(), {})
    if name == "draft_model":
        return Method(name, DraftModel(small[0], length - 1), small[1], {"n": length})
    if name == "hydra":
        hydra, weights = trained.heads[f"hydra n{length}"]
        return Method(name, hydra, weights, {"n": length})
    if name == "rank1":
        own, weights = next(
            (one, weights)
            for one, weights in trained.heads.values()
            if isinstance(one, HeadConfig) and one.rank == 1
        )
        config, weights = tune.shortened(own, weights, length)
    else:
        config, weights = trained.heads[name]
    about = {"rank": config.rank, "transition": config.transition, "n": length}
    return Method(name, Heads(config), weights, about)


def compared(trained: Trained, name: str, study: StudyConfig, turn: int, wanted: int) -> Row:
    """One batch of greedy text with drafts against plain decoding, both in float32 at the highest
    precision: in bfloat16 near ties fall either way. Other prompts every turn."""
    resolved = trained.resolved
    config, weights = trained.heads[name]
    model = dataclasses.replace(resolved.model, dtype="float32")
    new = min(_CHECK_NEW, study.new_tokens)
    target = Target(model, SamplingConfig(max_new_tokens=new), valid_vocab=resolved.valid_vocab)
    count = min(_CHECK_BATCH, -(-wanted // new))
    data = dataclasses.replace(resolved.config.data, eval_conversations=_CHECK_FILES)
    every = dataclasses.replace(resolved, config=dataclasses.replace(resolved.config, data=data))
    first = turn * _CHECK_BATCH
    texts = prompts.held_out(every, study.prompt_tokens, first + count)[first:]
    with jax.default_matmul_precision("highest"):
        wrong, checked = verify.greedy_mismatches(
            target, trained.params, Heads(config), weights, texts, ()
        )
    return {
        "rank": config.rank,
        "transition": config.transition,
        "n": config.predicted,
        "greedy_mismatches": wrong,
        "tokens_checked": checked,
    }


def summary(rows: Sequence[Row]) -> Row:
    """What the rows come to; parts that are not measured yet are left out.

    acceptance: expected tokens per call by length and temperature, of every head. fastest: by
    length and temperature at batch 1, the fastest CP or HMM head, with its speed over plain
    decoding and over rank 1, and the speeds of the baselines over plain decoding.
    """
    found: Row = {}
    acceptance: dict[str, Row] = {}
    for row in rows:
        if row.get("kind") == "acceptance":
            at = acceptance.setdefault(_setting(row), {})
            kind = "cp" if row["transition"] == "identity" else "hmm"
            at[f"{kind} r{row['rank']}"] = row["expected_tokens_per_call"]
    if acceptance:
        found["acceptance"] = acceptance
    timed = [row for row in rows if row.get("kind") == "decode" and row["batch"] == 1]
    fastest: dict[str, Row] = {}
    for block in dict.fromkeys(row["block"] for row in timed if row["block"].endswith("best")):
        here = [row for row in timed if row["block"] == block]
        heads = [row for row in here if row["method"] not in _BASELINES]
        best = max(heads, key=lambda row: row["tokens_per_s"])
        others = {row["method"]: row["speedup"] for row in here if row["method"] in _BASELINES}
        fastest[_setting(best)] = {
            "method": best["method"],
            "speedup": best["speedup"],
            "over_rank1": best["over_rank1"],
            "baselines": others,
        }
    if fastest:
        found["fastest"] = fastest
    checks = [row for row in rows if row.get("kind") == "greedy_check"]
    if checks:
        for name in ("greedy_mismatches", "tokens_checked"):
            found[name] = int(np.sum([row[name] for row in checks]))
    return found


def _setting(row: Row) -> str:
    return f"n{row['n']} t{row['temperature']:g}"
