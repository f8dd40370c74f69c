# SPDX-License-Identifier: Apache-2.0
"""The whole recipe of async decoding on one device: models are trained one after the other, each is
measured at once, and what is finished is not done again.

| stage | models |
|---|---|
| sft | `base`; from it `plain`, the sequential baseline; `predicted`; `fork_join_max` |
| preference | the first two lambdas, from `predicted` |
| forms | `best`, `sot`, `apar` |
| lambdas | the other lambdas |
| schemes | `fork_join_sum`; `oracle`, which cannot be decoded |
| plot | none: plots/ |

The base is what a pretrained model is elsewhere: it writes answers in a row, was trained longer
than what starts from it, and serves all. Its requests go down to the smallest there are, from which
a model learns to look words up much sooner than from long ones. With an `init_from`, or data of
one's own, there is no base.

Rows of all models are in eval.jsonl: kind "async" as of `evaluate`, of answers in batches, with
the wall-clock times of the first questions, answered again at batch 1; "preference" as of
`preference`, "held_out" (the loss that compares schemes of positions) and "training".
answers/NAME and timed/NAME are what a model answered, weights/base and weights/predicted what the
others start from; weights of another model are there until it has its row. Of a model that is half
trained, or half through its rounds, nothing outlives runs/.

Whoever annotated the data, `sot` and `apar` learn from the best annotations: a poor one is no fault
of theirs. `best` is `predicted` on the same annotations: what they are to be compared with, and
what preference optimisation could find without them.
"""

import dataclasses
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from typing import Any

import jax

from lm import jobs, studies, tables, train
from lm.async_decoding import (
    evaluate,
    figures,
    front,
    preference,
    quality,
    requests,
    runs,
    samplers,
    training,
)
from lm.async_decoding.config import RunConfig
from lm.async_decoding.quality import Question
from lm.async_decoding.runs import Run
from lm.config import require_choice, require_positive, to_dict
from lm.data import packing
from lm.errors import UserError
from lm.progress import say
from lm.stages import OutOfTime
from lm.studies import Study
from lm.transformer import Params
from lm.workdir import Workdir, provenance

STAGES = ("sft", "preference", "forms", "lambdas", "schemes", "plot")
LAMBDAS = (2.0, 8.0, 1.0, 4.0, math.inf)
BASE, BASELINE, START, BEST = "base", "plain", "predicted", "best"
LONGER = 2  # times the steps of what starts from it: how long the base is trained
BATCH = 128  # questions that are answered together; a skeleton makes several of each
TIMED = 64  # questions that are answered at batch 1
ROWS = "eval.jsonl"
ANSWERS, TIMES = "answers", "timed"  # folders, by model
_FIRST = 2  # lambdas that come before the other baselines
# what is trained on data alone
_SFT = {
    "sft": (BASELINE, START, "fork_join_max"),
    "forms": (BEST, "sot", "apar"),
    "schemes": ("fork_join_sum", "oracle"),
}
_FORMS = ("plain", "sot", "apar")
_UNLIKE = (*_FORMS, BEST)  # no schemes of positions on the same data
_SECTIONS = (*studies.MADE, "threads", "requests")
_WALL = ("speedup_wall", "speedup_wall_ci95", "realised")  # of a row: from the times
_COLUMNS = (
    *("name", "lambda", "quality", "quality_difference", "speedup_critical_path", "speedup_wall"),
    *("realised", "tokens", "steps", "well_formed", "n"),
)


def run(
    config: RunConfig,
    workdir: Workdir,
    lambdas: Sequence[float] = LAMBDAS,
    stage: str = "all",
    minutes: float | None = None,
    timed: int = TIMED,
) -> dict[str, Any]:
    """Runs a stage, or all of them, for at most `minutes`.

    config: of stage "sft"; every model's is made from it.
    lambdas: the first two are of stage "preference", the others of "lambdas".
    timed: how many questions are answered at batch 1.

    Returns `stage`, `done`, `rows` (of all models that were measured), `held_out_loss` by scheme,
    `no_pairs` (lambdas whose first round had none, which leaves `predicted` as it is),
    `hypervolume` by speed-up and family of points, `dominated` (whether some lambda is as good as
    each of the others in both quality and speed), and after "plot" `plots`.

    Raises UserError, also for a stage whose predecessors are missing, DataError and RunError.
    """
    require_choice("--stage", stage, (*STAGES, "all"))
    if config.threads.stage != "sft":
        raise UserError("a study begins with SFT: config.stage must be sft")
    recipe = _Recipe(config, tuple(lambdas), timed)
    calls = {name: functools.partial(recipe.measure, name) for name in STAGES[:-1]}
    found = studies.run(config, workdir, calls | {"plot": _plot}, stage, minutes)
    rows = _of_kind(workdir, evaluate.KIND)
    if rows:
        say(tables.text(tables.table(rows, columns=_COLUMNS)))
    return found | _outcome(workdir)


def plan(config: RunConfig) -> dict[str, float]:
    """Training FLOPs of the models of SFT; says them."""
    recipe = _Recipe(config, LAMBDAS)
    # a token sees half of a row at most
    names = [BASE] * recipe.has_base + [name for names in _SFT.values() for name in names]
    return {
        name: studies.plan(name, recipe.config_of(name), config.data.seq_len / 2) for name in names
    }


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What is trained, by name, and measured."""

    config: RunConfig
    lambdas: tuple[float, ...]
    timed: int = TIMED

    def __post_init__(self) -> None:
        require_positive("--timed", self.timed)
        if not self.lambdas or len(set(self.lambdas)) < len(self.lambdas):
            raise UserError(f"lambdas must differ, and be at least one: {self.lambdas}")
        for weight in self.lambdas:
            dataclasses.replace(self.config.preference, quality_weight=weight)  # checks it

    @functools.cached_property
    def weights(self) -> dict[str, float]:
        """The lambda of each model of preference optimisation."""
        return {f"lambda_{weight:g}": weight for weight in self.lambdas}

    def names(self, stage: str) -> tuple[str, ...]:
        """The models of a stage, in their order."""
        preferred = tuple(self.weights)
        by_stage = {"preference": preferred[:_FIRST], "lambdas": preferred[_FIRST:]}
        return (_SFT | by_stage)[stage]

    @property
    def has_base(self) -> bool:
        return self.config.data.source == "requests" and not self.config.init_from

    def start_of(self, name: str) -> str:
        """The model that another one is made from; "" is none of the recipe's."""
        if name in self.weights:
            return START
        return BASE if self.has_base and name != BASE else ""

    def config_of(self, name: str, start: str = "") -> RunConfig:
        """A model's config. start: where the weights are that it begins with."""
        config, threads = self.config, self.config.threads
        if begins := self.start_of(name):
            data = dataclasses.replace(config.data, tokenizer="auto")
            config = dataclasses.replace(config, init_from=start or begins, data=data)
        if name in self.weights:
            own = dataclasses.replace(config.preference, quality_weight=self.weights[name])
            threads = dataclasses.replace(
                threads, stage="preference", form="async", positions=START
            )
            return dataclasses.replace(config, threads=threads, preference=own)
        if name == BASE:
            steps = LONGER * config.train.steps
            small = {"min_parts": requests.LEAST_PARTS, "min_steps": 1, "annotators": ("best",)}
            config = dataclasses.replace(
                config,
                train=dataclasses.replace(config.train, steps=steps),
                requests=dataclasses.replace(config.requests, **small),
            )
        if name in _SFT["forms"]:
            asked = dataclasses.replace(config.requests, annotators=("best",))
            config = dataclasses.replace(config, requests=asked)
        if name in (BASE, *_FORMS):
            form = "plain" if name == BASE else name
            threads = dataclasses.replace(threads, form=form)
        else:
            scheme = START if name == BEST else name
            threads = dataclasses.replace(threads, form="async", positions=scheme)
        return dataclasses.replace(config, threads=threads)

    def sections(self, name: str) -> tuple[str, ...]:
        """Those of a config that make the model what it is."""
        return (*_SECTIONS, "preference") if name in self.weights else _SECTIONS

    def measure(self, stage: str, work: Study) -> dict[str, Any]:
        """Trains and measures the models of a stage that have no row yet. Raises OutOfTime."""
        if stage != "sft":
            for name in (BASELINE, START):
                if not _has(work.workdir, evaluate.KIND, name):
                    raise UserError(f"{work.workdir.path}: --stage=sft comes first")
        for name in self.names(stage):
            kind = "held_out" if name == "oracle" else evaluate.KIND
            made = self._digest(name)
            rows = [*_of_kind(work.workdir, kind), *_of_kind(work.workdir, "no_pairs")]
            for row in rows:
                if row["name"] == name and row["recipe"] != made:
                    raise UserError(
                        f"{work.workdir.path}: {name} was made by another config: take another "
                        "--workdir"
                    )
            if not any(_has(work.workdir, one, name) for one in (kind, "no_pairs")):
                work.clock.check()
                if self._train(work, name):
                    self._rows(work, name)
                if name != START:
                    shutil.rmtree(work.weights(name), ignore_errors=True)
        return {}

    def _digest(self, name: str) -> str:
        values = to_dict(self.config_of(name))
        asked = [values["preference"][key] for key in ("scorer", "threads")]
        made = [values[section] for section in (*self.sections(name), "sampling")]
        text = json.dumps([made, asked])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _train(self, work: Study, name: str) -> bool:
        """Leaves weights/NAME, and rows of the training; False where preference optimisation has no
        pairs to begin with, which leaves a row that says so. Raises OutOfTime."""
        folder, preferred = Workdir(work.runs / name), name in self.weights
        begins = self.start_of(name)
        if begins and not work.has(name):
            self._train(work, begins)  # only where that is not there any more
        config = self.config_of(name, str(work.weights(begins)) if begins else "")
        if preferred:
            own = config.preference
            make = samplers.decoder(config, own.threads, own.prompts_at_once * own.samples)
            self._share_samples(work, name)
            call = functools.partial(preference.run, config, folder, make, clock=work.clock)
            newest = preference.round_path(folder.path, own.rounds)
        else:
            newest = folder.path
            call = functools.partial(training.run, config, folder)
        try:
            if not studies.trained(work, name, config, call, newest, self.sections(name)):
                raise OutOfTime
        except preference.NoPairs as error:
            newest = runs.newest(folder.path)
            if newest == folder.path:
                self._add(work, name, {"kind": "no_pairs", "reason": str(error)})
                return False
            say(f"{error}: the round before is the last")
            studies.keep(newest, work.weights(name))
        if not _has(work.workdir, "training", name):
            number = {"round": int(newest.name.removeprefix(runs.ROUND))} if preferred else {}
            self._add(work, name, {"kind": "training", **studies.metrics(work, name), **number})
            for row in _of_kind(folder, preference.KIND) if preferred else ():
                self._add(work, name, row)
        return True

    def _share_samples(self, work: Study, name: str) -> None:
        """A first round asks what that of another lambda asked, of the same model: its samples
        serve all."""
        folder = preference.round_path(work.runs / name, 1)
        drawn = [preference.round_path(work.runs / one, 1) for one in self.weights]
        found = [one / preference.SAMPLES for one in drawn if (one / preference.DONE).exists()]
        if found and not (folder / preference.SAMPLES).exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found[0], folder / preference.SAMPLES)

    def _rows(self, work: Study, name: str) -> None:
        """The rows of a trained model. Raises OutOfTime."""
        place = work.weights(name)
        if name not in (*_UNLIKE, *self.weights) and not _has(work.workdir, "held_out", name):
            resolved, params = runs.load(place)
            loss, tokens = held_out_loss(resolved, params)
            self._add(work, name, {"kind": "held_out", "loss": loss, "tokens": tokens})
        if name == "oracle":
            return
        asked = quality.questions(runs.conversations(self.config, "validation"))
        row = self._row(work, name, ANSWERS, asked, BATCH)
        times = self._row(work, name, TIMES, asked[: self.timed], 1)
        row |= {key: times[key] for key in _WALL if key in times} | {"timed": times["n"]}
        for one in _of_kind(work.workdir, "training"):
            if one["name"] == name and "round" in one:
                row["round"] = one["round"]
        if name == BEST:  # figures tell rows apart by their methods
            row["method"] += ", best annotations"
        self._add(work, name, {**row, "source": self.config.data.source})

    def _row(
        self, work: Study, name: str, kind: str, asked: Sequence[Question], batch: int
    ) -> dict[str, Any]:
        """What a model answered, beside the baseline. Raises OutOfTime."""
        own = self.config.preference
        options = evaluate.Options(scorer=own.scorer, batch_size=batch, threads=own.threads)
        make = samplers.decoder(self.config, own.threads, batch)
        folder = _answers(work.workdir, kind, name)
        place = work.weights(name)
        found = evaluate.measure(place, self.config, asked, make, options, work.clock, folder)
        against = found
        if name != BASELINE:
            against = evaluate.kept(_answers(work.workdir, kind, BASELINE))
        if against is None or len(against.answers) != len(asked):
            raise UserError(f"{folder.path.parent} has not what {BASELINE} answered to these")
        return evaluate.row_of(found, against, asked, options)

    def _add(self, work: Study, name: str, row: dict[str, Any]) -> None:
        """Appends a row, and what is needed to understand it later."""
        recipe = self._digest(name)
        work.workdir.append(ROWS, {"name": name, **row, "recipe": recipe, **provenance()})


def held_out_loss(resolved: Run, params: Params) -> tuple[float, int]:
    """(nats per trained token of the held-out conversations, tokens). Schemes of positions train
    the same tokens of the same rows, so that their losses compare them."""
    setup, config = resolved.setup, resolved.config
    execution = jobs.execution_of(setup, None)
    measured = jax.jit(train.edge_objective(setup.model, execution, "per_token"))
    rows = training.rows(resolved, runs.conversations(config, "validation"), shuffle=False)
    params, total, tokens = train.cast(params, setup.model.dtype), 0.0, 0.0
    for batch in packing.batches(rows, config.train.batch_size, config.data.seq_len):
        value, sums = measured(params, train.to_device(batch, None), jax.random.key(0))
        total, tokens = total - float(value), tokens + float(sums["weight"])
    return total / max(tokens, 1.0), round(tokens)


def _plot(work: Study) -> dict[str, Any]:
    folders = sorted((work.workdir.path / ANSWERS).glob("*"))
    folders = [folder for folder in folders if folder.name != BEST]  # called as START's
    drawn = figures.draw(figures.gather([work.workdir.path]), figures.timelines(folders))
    return {"plots": figures.save(drawn, work.workdir.path / "plots")}


def _outcome(workdir: Workdir) -> dict[str, Any]:
    rows = _of_kind(workdir, evaluate.KIND)
    out: dict[str, Any] = {
        "rows": [{key: row.get(key) for key in _COLUMNS} for row in rows],
        "held_out_loss": {row["name"]: row["loss"] for row in _of_kind(workdir, "held_out")},
        "no_pairs": {row["name"]: row["reason"] for row in _of_kind(workdir, "no_pairs")},
        "hypervolume": {},
        "dominated": {},
    }
    for speed in figures.SPEEDS:
        points: dict[str, list[front.Point]] = {}
        for row in rows:
            if row.get(speed) and row["name"] != BASELINE:
                family = "lambdas" if row["lambda"] is not None else row["name"]
                points.setdefault(family, []).append((row["quality"], row[speed]))
        out["hypervolume"][speed] = {name: front.hypervolume(own) for name, own in points.items()}
        preferred = points.pop("lambdas", None)
        if preferred:
            out["dominated"][speed] = {
                name: front.dominates(preferred, own) for name, own in points.items()
            }
    return out


def _of_kind(workdir: Workdir, kind: str) -> list[dict[str, Any]]:
    return [row for row in workdir.rows(ROWS) if row.get("kind") == kind]


def _has(workdir: Workdir, kind: str, name: str) -> bool:
    return any(row["name"] == name for row in _of_kind(workdir, kind))


def _answers(workdir: Workdir, kind: str, name: str) -> Workdir:
    return Workdir(workdir.path / kind / name)
