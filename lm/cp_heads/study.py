# SPDX-License-Identifier: Apache-2.0
"""What rank buys, measured on one target: a trunk is trained, every head on it, and all of them are
compared, in stages that go on where they were.

| stage | what it leaves in the workdir |
|---|---|
| trunk | trunk/, draft/: the target and a small model that drafts for it |
| heads | heads/: every head, and Hydra heads as large as the largest, trained in one step |
| offline | rows of expected acceptance in eval.jsonl, greedy and sampled |
| decode | rows of tokens/s in benchmark.jsonl: block by block, each with plain decoding beside it |
| check | rows of greedy tokens compared with plain decoding, in float32 |

Rows and figures are all that is worth keeping; a trunk need not outlive the machine it was made on.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lm import generate, losses, setup, stages, studies, train
from lm.cp_heads import baselines, checkpoints, evaluate, figures, together, training
from lm.cp_heads import study_decode as decoding
from lm.cp_heads.baselines import Hydra
from lm.cp_heads.config import CpConfig
from lm.cp_heads.head import HeadConfig
from lm.cp_heads.study_decode import Trained
from lm.data import packing
from lm.errors import UserError
from lm.flops import training_flops
from lm.progress import say
from lm.stages import Clock
from lm.transformer import Params
from lm.workdir import Workdir, provenance

_TEXTS = 64  # decoded and measured at once
_HELD_ROWS = 64  # rows of held-out text that the trunk's own loss is of


@dataclasses.dataclass(frozen=True)
class Study:
    """One study: its config and where it works."""

    config: CpConfig
    workdir: Workdir
    clock: Clock

    @property
    def trunk(self) -> Workdir:
        return Workdir(self.workdir.path / "trunk")

    @property
    def draft(self) -> Workdir:
        return Workdir(self.workdir.path / "draft")

    @property
    def heads(self) -> Workdir:
        return Workdir(self.workdir.path / "heads")

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Those of this workdir."""
        found = [row for name in figures.FILES for row in self.workdir.rows(name)]
        return [row for row in found if row.get("kind") == kind]

    def add(self, row: dict[str, Any], file: str = "eval.jsonl") -> None:
        """Appends a row, and what is needed to understand it later."""
        self.workdir.append(file, row | provenance() | {"jax": jax.__version__})


STAGES = ("trunk", "heads", "offline", "decode", "check")


def run(
    config: CpConfig, workdir: Workdir, stage: str = "all", minutes: float | None = None
) -> dict[str, Any]:
    """Runs a stage, or all that are left, for at most `minutes`: what has ended is not done again,
    and what has not goes on in the next call.

    Raises UserError, also for a stage whose predecessors are missing, DataError and RunError.
    """
    calls: dict[str, Callable[[Study], bool]] = {
        "trunk": _train_trunk,
        "heads": _train_heads,
        "offline": _offline,
        "decode": decode,
        "check": check,
    }

    def bounded(call: Callable[[Study], bool], work: studies.Study) -> dict[str, Any] | None:
        return {} if call(Study(config, work.workdir, work.clock)) else None

    within = {name: functools.partial(bounded, call) for name, call in calls.items()}
    found = studies.run(config, workdir, within, stage, minutes)
    return found | _outcome(Study(config, workdir, stages.UNLIMITED))


def _outcome(study: Study) -> dict[str, Any]:
    """Rows so far, figures of them, and what they come to."""
    rows = [row for name in figures.FILES for row in study.workdir.rows(name)]
    drawn = figures.draw(figures.latest(rows))
    plots = figures.save(drawn, study.workdir.path / "plots") if drawn else []
    return {"rows": len(rows), "plots": plots, "summary": decoding.summary(rows)}


# --- what is trained


def members_of(config: CpConfig) -> dict[str, HeadConfig | Hydra]:
    """Every head of the study by name.

    Rank 1 is there for the longest length only: factors of independent heads do not depend on each
    other, so a shorter one is its beginning, and nothing but that.
    """
    own, model = config.study, config.model
    members: dict[str, HeadConfig | Hydra] = {}
    for length in sorted(own.lengths):
        for rank in sorted(own.ranks):
            if rank == 1 and length < max(own.lengths):
                continue
            for transition in ("identity", own.hmm) if rank > 1 else ("identity",):
                one = dataclasses.replace(
                    config.head, rank=rank, predicted=length, transition=transition
                )
                members[evaluate.name_of(one)] = one
        largest = dataclasses.replace(
            config.head, rank=max(own.ranks), predicted=length, transition="identity"
        )
        shape = jax.eval_shape(
            lambda key, largest=largest: together.init(key, {"": largest}, model), jax.random.key(0)
        )
        size = sum(x.size for x in jax.tree.leaves(shape))
        members[f"hydra n{length}"] = Hydra(length, baselines.hydra_width(largest, model, size))
    return members


def _of_trunk(config: CpConfig) -> CpConfig:
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, mode="trunk"))


def _of_draft(config: CpConfig, tokenizer: pathlib.Path) -> CpConfig:
    """The small model: the trunk's tokens, fewer and narrower layers."""
    own, model = config.study, config.model
    heads = max(1, own.draft_dim // model.head_dim)
    small = dataclasses.replace(
        model,
        num_layers=own.draft_layers,
        embed_dim=own.draft_dim,
        num_heads=heads,
        num_kv_heads=heads,
        mlp_dim=3 * own.draft_dim,
    )
    data = dataclasses.replace(config.data, tokenizer=str(tokenizer))
    steps = dataclasses.replace(config.train, steps=own.draft_steps)
    return dataclasses.replace(
        _of_trunk(config),
        model=small,
        data=data if tokenizer.is_dir() else config.data,
        train=steps,
    )


def _of_heads(config: CpConfig, trunk: Workdir) -> CpConfig:
    own = config.study
    options = dataclasses.replace(
        config.train, steps=own.head_steps, batch_size=own.head_batch, accumulate=1
    )
    return dataclasses.replace(
        config,
        loss=dataclasses.replace(config.loss, mode="heads"),
        train=options,
        optimizer=dataclasses.replace(config.optimizer, clip_norm=0.0),
        data=dataclasses.replace(config.data, tokenizer="auto"),
        init_from=str(trunk.path),
    )


def plan(config: CpConfig) -> dict[str, float]:
    """FLOPs of the trainings; says them and, on a known chip, the minutes at 35 % of its peak."""
    config = studies.sized(config)
    length, trunk = config.data.seq_len, _of_trunk(config)
    found = {}
    for name, own in (("trunk", trunk), ("draft", _of_draft(config, pathlib.Path()))):
        tokens = own.train.steps * own.train.batch_size * length
        found[name] = training_flops(own.model, tokens, tokens, tokens * length / 2)
    heads = _of_heads(config, Workdir("."))
    members = members_of(config)
    found["heads"] = heads.train.steps * together.step_flops(heads, members)
    for name, flops in found.items():
        studies.say_plan(name, flops)
    positions = heads.loss.fraction * heads.train.batch_size * length
    say(
        f"plan: {len(members)} heads, {together.rows_of(members)} rows of vocabulary for each of "
        f"{positions * heads.train.steps / 1e6:.2f} M positions"
    )
    return found


def _train_trunk(study: Study) -> bool:
    """The target, then the small model that drafts for it."""
    if not (study.trunk.path / "config.json").exists():
        plan(study.config)
    jobs = (
        ("trunk", study.trunk, lambda: _of_trunk(study.config)),
        (
            "draft",
            study.draft,
            lambda: _of_draft(study.config, study.trunk.path / "tokenizer"),
        ),
    )
    for name, workdir, config_of in jobs:
        config = config_of()
        if _trained(study, name, config.train.steps):
            continue
        began = time.monotonic()
        if not stages.train(study.clock, lambda c=config, w=workdir: training.run(c, w)):
            return False
        resolved, params, _ = checkpoints.load_run(workdir.path)
        held = held_out_loss(resolved, params)
        _note(study, name, workdir, params, began, {"held_out_loss": held})
    return True


def _train_heads(study: Study) -> bool:
    _require(study, "trunk")
    _check_heads(study)
    config = _of_heads(study.config, study.trunk)
    if _trained(study, "heads", config.train.steps):
        return True
    resolved, _, _ = checkpoints.load_run(study.trunk.path)
    members = members_of(dataclasses.replace(study.config, model=resolved.model))
    began = time.monotonic()
    call = lambda: together.run(config, members, study.heads)  # noqa: E731
    if not stages.train(study.clock, call):
        return False
    made = together.load(study.heads)
    _note(study, "heads", study.heads, made, began, {"heads": len(made)})
    return True


def _trained(study: Study, name: str, steps: int) -> bool:
    return any(r["method"] == name and r["steps"] == steps for r in study.rows("training"))


def _require(study: Study, *names: str) -> None:
    """Raises UserError unless these trainings have ended."""
    for name in names:
        if not any(row["method"] == name for row in study.rows("training")):
            stage = "trunk" if name == "draft" else name
            raise UserError(f"{study.workdir.path}: --stage={stage} comes first")


def _check_heads(study: Study) -> None:
    """Raises UserError when the workdir was made for other heads."""
    if not (study.heads.path / "config.json").exists():
        return
    kept = study.heads.config(CpConfig)
    for name in ("ranks", "lengths", "hmm"):
        before, now = getattr(kept.study, name), getattr(study.config.study, name)
        if before != now:
            raise UserError(
                f"{study.heads.path} has heads of study.{name}={before}, the config says {now}: "
                "take another --workdir"
            )


def _note(study: Study, name: str, workdir: Workdir, params: Any, began: float, more) -> None:
    """The row of a training that has ended."""
    metrics = workdir.rows("metrics.jsonl")
    last = {k: v for k, v in metrics[-1].items() if k not in ("step", "grad_norm")}
    study.add(
        {
            "kind": "training",
            "method": name,
            "steps": metrics[-1]["step"],
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "seconds_of_last_call": time.monotonic() - began,
            **last,
            **more,
        }
    )


def held_out_loss(resolved: setup.Setup, params: Params) -> float:
    """Nats per token of held-out text, from its first rows."""
    model, data = resolved.model, resolved.config.data
    execution = losses.Execution(valid_vocab=resolved.valid_vocab)
    rows = setup.text_rows(resolved, "validation", shuffle=False)
    size = min(resolved.config.train.batch_size, _HELD_ROWS)
    measured = jax.jit(train.edge_objective(model, execution, "per_token"))
    total = weight = 0.0
    params = generate.cast(model, params)
    batches = packing.batches(rows, size, data.seq_len)
    for _, batch in zip(range(-(-_HELD_ROWS // size)), batches, strict=False):
        value, sums = measured(params, train.to_device(batch, None), jax.random.key(0))
        total, weight = total - float(value), weight + float(sums["weight"])
    return total / max(weight, 1.0)


# --- what is measured


def target_of(study: Study) -> Trained:
    """Trunk and heads. Raises UserError before everything is trained."""
    _require(study, "trunk", "draft", "heads")
    _check_heads(study)
    resolved, params, _ = checkpoints.load_run(study.trunk.path)
    members = members_of(dataclasses.replace(study.config, model=resolved.model))
    made = together.load(study.heads)
    return Trained(resolved, params, {name: (one, made[name]) for name, one in members.items()})


def _offline(study: Study) -> bool:
    """Expected acceptance of every head, on texts that the target drew."""
    _require(study, "trunk", "draft", "heads")
    todo = _unmeasured(study)
    if not todo:
        return True
    target = target_of(study)
    params = generate.cast(target.resolved.model, target.params)
    options = evaluate.Options(prompt_tokens=study.config.study.prompt_tokens, batch_size=_TEXTS)
    for name, temperature in todo:
        if study.clock.left() <= 0:
            return False
        sampling = dataclasses.replace(study.config.sampling, temperature=temperature)
        texts = _texts(study, target, params, sampling, options)
        one, _ = target.heads[name]
        rows = evaluate.measure(target.loaded(name, params), params, texts, sampling, options)
        lengths = study.config.study.lengths if one.rank == 1 else (one.predicted,)
        for row in rows:
            if row["n"] in lengths:
                study.add({**row, "head": name, "source": study.config.data.source})
    return True


def _unmeasured(study: Study) -> list[tuple[str, float]]:
    """Heads and temperatures without a row of acceptance."""
    known = {(row["head"], row["temperature"]) for row in study.rows("acceptance")}
    wanted = [
        (name, temperature)
        for temperature in study.config.study.temperatures
        for name, one in members_of(study.config).items()
        if isinstance(one, HeadConfig)
    ]
    return [one for one in wanted if one not in known]


def _acceptance(study: Study) -> list[dict[str, Any]]:
    """The rows of acceptance. Raises UserError unless all are there."""
    _require(study, "trunk", "draft", "heads")
    if _unmeasured(study):
        raise UserError(f"{study.workdir.path}: --stage=offline comes first")
    return study.rows("acceptance")


def _texts(study, target, params, sampling, options) -> evaluate.Texts:
    """Drawn once: every head is measured on the same."""
    path = study.workdir.path / f"texts_t{sampling.temperature:g}.npz"
    if path.exists():
        with np.load(path) as found:
            return evaluate.Texts(**found)
    data = target.resolved.config.data
    texts = evaluate.texts_of(target.resolved, params, data, sampling, options)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, **dataclasses.asdict(texts))
    partial.replace(path)
    return texts


def decode(study: Study) -> bool:
    """Tokens per second, block by block: the most telling ones first."""
    offline = _acceptance(study)
    todo = decoding.blocks(study.config.study, offline)
    done = {row["block"] for row in study.rows("decode")}
    todo = [block for block in todo if block.name not in done]
    if not todo:
        return True
    target = target_of(study)
    draft_setup, draft_params, _ = checkpoints.load_run(study.draft.path)
    per_method = 0.0
    for block in todo:
        # a block that could not end is not begun
        if study.clock.left() <= per_method * len(block.methods):
            return False
        began = time.monotonic()
        rows = decoding.timed(block, target, (draft_setup.model, draft_params), study.config.study)
        for row in rows:
            study.add({**row, "block": block.name}, "benchmark.jsonl")
        per_method = max(per_method, (time.monotonic() - began) / len(block.methods))
    return True


def check(study: Study) -> bool:
    """Greedy text of the best heads against plain decoding, token by token."""
    offline = _acceptance(study)
    wanted = study.config.study.check_tokens
    rows = study.rows("greedy_check")
    turn, checked = len(rows), sum(row["tokens_checked"] for row in rows)
    if checked >= wanted:
        return True
    target = target_of(study)
    names = decoding.finalists(study.config.study, offline)
    slowest = 0.0
    while checked < wanted:
        if study.clock.left() <= slowest:
            return False
        began = time.monotonic()
        name = names[turn % len(names)]
        row = decoding.compared(target, name, study.config.study, turn, wanted - checked)
        study.add({"kind": "greedy_check", "method": name, **row})
        turn, checked = turn + 1, checked + row["tokens_checked"]
        slowest = max(slowest, time.monotonic() - began)
    return True
