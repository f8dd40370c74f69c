# SPDX-License-Identifier: Apache-2.0
"""Preference optimisation in rounds: sample, score, prefer the best to the worst, and again from
the new policy (arXiv 2502.11517; the loss is in `bonbon`).

| WORKDIR/ | |
|---|---|
| round_R/samples.jsonl | the answers of the policy that round R starts from, prompt by prompt |
| round_R/pairs.jsonl | best and worst of each prompt, with that policy's log-probabilities |
| round_R/ | a workdir like any other: config, metrics, checkpoints |
| baseline.jsonl | tokens of sequential answers, where a sequential run gives them |
| eval.jsonl | after each round quality and speed-up of greedy answers to held-out prompts |

A rerun goes on where it was: samples that are there are not drawn again, finished rounds are
skipped. `runs.newest` finds the weights.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lm import generate, loop, lora, setup, train, tuned
from lm.async_decoding import bonbon, critical_path, front, pairs, quality, runs, training
from lm.async_decoding.answers import Answer
from lm.async_decoding.config import PreferenceConfig, RunConfig
from lm.async_decoding.pairs import Pair
from lm.async_decoding.quality import Question, Scorer
from lm.async_decoding.runs import Run
from lm.data import packing
from lm.data.layout import Layout
from lm.errors import RunError, UserError
from lm.progress import Progress, say
from lm.stages import UNLIMITED, Clock
from lm.transformer import Params
from lm.workdir import Workdir

Sampler = Callable[[Sequence[str], int], list[Answer]]  # (prompts, seed) -> an answer each
# (a run, its parameters, a temperature) -> what draws answers from it
MakeSampler = Callable[[Run, Params, float], Sampler]

SAMPLES, PAIRS, BASELINE = "samples.jsonl", "pairs.jsonl", "baseline.jsonl"
DONE, COUNTS = "done.json", "counts.json"
KIND = "preference"  # of the rows in eval.jsonl


class NoPairs(RunError):
    """No prompt of a round gives a best and a worst sample."""


def run(
    config: RunConfig,
    workdir: Workdir,
    sampler: MakeSampler,
    scorer: Scorer | None = None,
    clock: Clock = UNLIMITED,
) -> loop.Result:
    """Runs the rounds that are left; the result is that of the last one.

    scorer: by default the one that the config names.
    clock: what of its time is left is asked before answers are drawn; `stages.train` also stops the
      training of a round with it.

    Raises:
      UserError: a config that cannot run, or a workdir with samples or pairs of other settings.
      NoPairs: a round has nothing to train on; those before it are kept.
      RunError: training broke.
      OutOfTime: of the clock, with what was drawn kept.
    """
    if jax.process_count() > 1:
        raise UserError("preference optimisation runs on one process")
    workdir.refuse_run()
    _check_pairs(config, workdir)
    workdir.create(config)
    workdir.record(config)
    scorer = scorer or quality.scorer(config.preference.scorer)
    study = _Study(config, workdir, sampler, scorer, clock)
    result = None
    for number in range(1, config.preference.rounds + 1):
        one = _Round(study, number)
        if number < config.preference.rounds and (one.place.path / DONE).exists():
            say(f"{one.place.path}: already done")
            continue
        result = one.run()
    return result


def _check_pairs(config: RunConfig, workdir: Workdir) -> None:
    """Raises UserError where pairs were chosen, or rows written, under other settings."""
    rows = any(row.get("kind") == KIND for row in workdir.rows("eval.jsonl"))
    if not rows and not any(workdir.path.glob(f"{runs.ROUND}*/{PAIRS}")):
        return
    before = workdir.config(type(config))
    changed = [
        f"preference.{name}"
        for name in ("quality_weight", "scorer", "speed", "baseline")
        if getattr(before.preference, name) != getattr(config.preference, name)
    ]
    changed += ["data.seq_len"] * (before.data.seq_len != config.data.seq_len)
    if changed:
        raise UserError(
            f"{workdir.path} holds rounds of other settings ({', '.join(changed)}): use another "
            "workdir"
        )


def round_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Where a round works."""
    return folder / f"{runs.ROUND}{number}"


@dataclasses.dataclass(frozen=True)
class _Study:
    """What all rounds share."""

    config: RunConfig
    workdir: Workdir
    sampler: MakeSampler
    scorer: Scorer
    clock: Clock

    @property
    def own(self) -> PreferenceConfig:
        return self.config.preference

    @functools.cached_property
    def questions(self) -> list[Question]:
        """All that may be asked in training."""
        return quality.questions(runs.conversations(self.config))

    @functools.cached_property
    def held_out(self) -> list[Question]:
        """What each round is measured on."""
        return quality.questions(runs.conversations(self.config, "validation"))

    def score(self, question: Question, answer: Answer, length: int) -> tuple[float, float]:
        """(quality, the speed term) of an answer; length: tokens of the sequential one."""
        return self.scorer(question, answer.assembly), self.speed(answer, length)

    def speed(self, answer: Answer, length: int) -> float:
        steps = max(answer.steps, 1)
        if self.own.speed == "parallelism":
            return answer.decoded / steps
        return critical_path.speedup(length, steps)

    def lengths(self, questions: Sequence[Question], resolved: Run) -> list[int]:
        """Tokens of the sequential answer to each question. Raises UserError."""
        if self.own.baseline:
            return self._baseline_lengths(questions)
        if not all(question.reference for question in questions):
            raise UserError(
                "the data has prompts without answers, and speed-ups are over their lengths: name "
                "a sequential run as preference.baseline"
            )
        tokenizer = resolved.setup.tokenizer
        return [quality.sequential_length(question, tokenizer) for question in questions]

    def _baseline_lengths(self, questions: Sequence[Question]) -> list[int]:
        """Of a sequential run's greedy answers, kept in a file."""
        sampling = dataclasses.asdict(self.config.sampling)
        about = {"baseline": str(self.own.baseline), "sampling": sampling}
        rows = self.workdir.rows(BASELINE)
        if rows and rows[0] != about:
            changed = ", ".join(key for key in about if rows[0].get(key) != about[key])
            raise UserError(
                f"{self.workdir.path / BASELINE} is of another {changed}: use another workdir"
            )
        known = {row["prompt"]: row["tokens"] for row in rows[1:]}
        prompts = [question.prompt for question in questions]
        missing = [prompt for prompt in dict.fromkeys(prompts) if _digest(prompt) not in known]
        if missing:
            self.workdir.write(BASELINE, "".join(json.dumps(row) + "\n" for row in rows or [about]))
            loaded, params = runs.load(pathlib.Path(self.own.baseline))
            draw = self.sampler(loaded, params, 0.0)
            at_once = self.own.prompts_at_once * self.own.samples
            with Progress("baseline", len(missing)) as progress:
                for first in range(0, len(missing), at_once):
                    self.clock.check()
                    group = missing[first : first + at_once]
                    for prompt, answer in zip(group, draw(group, 0), strict=True):
                        row = {"prompt": _digest(prompt), "tokens": answer.decoded}
                        known[row["prompt"]] = row["tokens"]
                        self.workdir.append(BASELINE, row)
                    progress.advance(len(group))
        return [known[_digest(prompt)] for prompt in prompts]


@dataclasses.dataclass(frozen=True)
class _Round:
    """One round of a study."""

    study: _Study
    number: int

    @functools.cached_property
    def place(self) -> Workdir:
        return Workdir(round_path(self.study.workdir.path, self.number))

    @functools.cached_property
    def resolved(self) -> Run:
        config, before = self.study.config, self.study.config.init_from
        if self.number > 1:
            before = str(round_path(self.study.workdir.path, self.number - 1))
        data = dataclasses.replace(config.data, tokenizer="auto")
        config = dataclasses.replace(config, data=data, init_from=before)
        return runs.resolve(config, self.place.path / "tokenizer")

    def run(self) -> loop.Result:
        """Runs the round, or what is left of it."""
        self.place.create(self.resolved.setup.requested)
        runs.save_tokenizer(self.resolved, self.place)
        if self.number == 1:
            self._measure(0, self._start)
        rows, name = self._rows()
        result = loop.fit(bonbon.job(self.resolved, rows, name), self.place)
        self._measure(self.number, lambda: result.state.params)
        self.place.write(DONE, json.dumps({"step": result.step, "loss": result.loss}) + "\n")
        return result

    def _start(self) -> Params:
        """What training changes, as the round finds it."""
        return runs.trained_params(self.resolved, None)

    def _policy(self, trained: Params) -> tuple[Run, Params]:
        """What answers: adapters merged into the weights."""
        whole = train.merge(trained, setup.frozen_params(self.resolved.setup, None))
        model, params = lora.merge_adapters(self.resolved.setup.model, whole)
        inner = self.resolved.setup
        inner = dataclasses.replace(inner, config=dataclasses.replace(inner.config, model=model))
        return dataclasses.replace(self.resolved, setup=inner), params

    # --- samples

    @functools.cached_property
    def asked(self) -> list[Question]:
        """The prompts of this round: others in each, as far as there are any."""
        questions, wanted = self.study.questions, self.study.own.prompts
        order = np.random.default_rng(self.study.config.train.seed).permutation(len(questions))
        first = (self.number - 1) * wanted
        count = min(wanted, len(order))
        return [questions[order[(first + i) % len(order)]] for i in range(count)]

    def _samples(self) -> list[list[Answer]]:
        """The samples of every prompt; those that are in the file are not drawn again."""
        own = self.study.own
        policy = self._policy(self._start())
        about = self._about(policy[1])
        rows = self.place.rows(SAMPLES)
        if rows and rows[0] != about:
            changed = sorted(key for key in about if rows[0].get(key) != about[key])
            raise UserError(
                f"{self.place.path / SAMPLES} holds samples of other settings "
                f"({', '.join(changed)}): use another workdir"
            )
        if rows and len(rows) <= len(self.asked):  # prompts drawn together share a seed
            rows = rows[: 1 + (len(rows) - 1) // own.prompts_at_once * own.prompts_at_once]
        # a line that a kill cut short is written again
        self.place.write(SAMPLES, "".join(json.dumps(row) + "\n" for row in rows or [about]))
        done, count = max(len(rows) - 1, 0), len(self.asked)
        draw = None
        with Progress(f"round {self.number}: prompts", count, done) as progress:
            for first in range(done, count, own.prompts_at_once):
                self.study.clock.check()
                group = self.asked[first : first + own.prompts_at_once]
                prompts = [one.prompt for one in group for _ in range(own.samples)]
                draw = draw or self.study.sampler(*policy, own.temperature)
                drawn = iter(draw(prompts, self._seed(first)))
                for _ in group:
                    answers = [pairs.to_record(next(drawn)) for _ in range(own.samples)]
                    self.place.append(SAMPLES, {"answers": answers})
                progress.advance(len(group))
        tokenizer = self.resolved.setup.tokenizer
        found = [row["answers"] for row in self.place.rows(SAMPLES)[1:]]
        return [
            [pairs.from_record(q.prompt, one, tokenizer, tokenizer.stop_ids) for one in answers]
            for q, answers in zip(self.asked, found, strict=True)
        ]

    def _seed(self, first: int) -> int:
        """Of the draws for the prompts from `first` on."""
        key = (self.study.config.train.seed, self.number, first)
        return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)

    def _about(self, params: Params) -> dict[str, Any]:
        """What the samples depend on."""
        config, own = self.study.config, self.study.own
        text = json.dumps([[one.prompt, one.reference] for one in self.asked])
        return {
            "policy": tuned.digest(params),
            "prompts": _digest(text),
            "samples": own.samples,
            "temperature": own.temperature,
            "threads": own.threads,
            "sampling": dataclasses.asdict(config.sampling),
            "positions": config.threads.positions,
            "seed": config.train.seed,
        }

    # --- pairs

    def _rows(self) -> tuple[list[packing.Row], str]:
        """The rows to train on, and a name for them. Raises RunError when there is none."""
        file = self.place.path / PAIRS
        answers = self._samples()
        if not file.exists():
            chosen, counts = self._choose(answers)
            say(f"round {self.number}: {len(chosen)} pairs; " + _in_words(counts))
            if not chosen:
                raise NoPairs(f"round {self.number}: no prompt gives a pair: {_in_words(counts)}")
            rows = self._layouts(answers, chosen)
            found = bonbon.reference_of(
                self.resolved, self._start(), rows, self.study.config.train.batch_size
            )
            chosen = [
                dataclasses.replace(pair, reference=(float(best), float(worst)))
                for pair, (best, worst) in zip(chosen, found, strict=True)
            ]
            self.place.write(COUNTS, json.dumps(counts) + "\n")
            self.place.write(PAIRS, pairs.dumps(chosen))
        text = file.read_text()
        return self._layouts(answers, pairs.loads(text)), _digest(text)

    def _choose(self, answers: Sequence[Sequence[Answer]]) -> tuple[list[Pair], dict[str, int]]:
        """The pair of each prompt that has one, and how many prompts and samples fell out why."""
        own, tokenizer = self.study.own, self.resolved.setup.tokenizer
        lengths = self.study.lengths(self.asked, self.resolved)
        found, why = [], []
        for number, (question, samples) in enumerate(zip(self.asked, answers, strict=True)):
            scores = []
            for answer in samples:
                good, speed = self.study.score(question, answer, lengths[number])
                scores.append(pairs.score(speed, good, own.quality_weight))
            sizes = [self._layout(question, answer) for answer in samples]
            fits = [made is not None for made in sizes]
            whole = [pairs.well_formed(one, tokenizer, tokenizer.stop_ids) for one in samples]
            why += ["sample malformed"] * whole.count(False) + ["sample unfit"] * fits.count(False)
            may_win = [a and b for a, b in zip(fits, whole, strict=True)]
            chosen = pairs.choose(scores, may_win, fits)
            if isinstance(chosen, str):
                why.append(f"prompt {chosen}")
            else:
                found.append(Pair(number, *chosen))
        return found, pairs.counted(why)

    def _layout(self, question: Question, answer: Answer) -> Layout | None:
        """The layout of a sample; None when it has none, or one beyond data.seq_len."""
        tokenizer = self.resolved.setup.tokenizer
        prompt = self._encoded(question.prompt)
        made = pairs.program_of(answer, prompt, tokenizer, tokenizer.stop_ids)
        if made is None or made.program.size > self.study.config.data.seq_len:
            return None
        return pairs.layout_of(made, training.scheme_of(self.study.config.threads))

    def _encoded(self, prompt: str) -> np.ndarray:
        """A prompt as the template shows it."""
        if prompt not in self._prompts:
            inner = self.resolved.setup
            self._prompts[prompt] = quality.encode_prompt(prompt, inner.template, inner.tokenizer)
        return self._prompts[prompt]

    @functools.cached_property
    def _prompts(self) -> dict[str, np.ndarray]:
        return {}

    def _layouts(
        self, answers: Sequence[Sequence[Answer]], chosen: Sequence[Pair]
    ) -> list[packing.Row]:
        """A row of each pair, as long as the longest needs."""
        made = []
        for pair in chosen:
            question, samples = self.asked[pair.prompt], answers[pair.prompt]
            made.append([self._layout(question, samples[i]) for i in (pair.best, pair.worst)])
        longest = max(sum(max(one.length, one.num_edges) for one in both) for both in made)
        size = generate.bucket(longest)
        return [
            pairs.row_of(*both, pair.reference, size)
            for both, pair in zip(made, chosen, strict=True)
        ]

    # --- what a round comes to

    def _measure(self, number: int, trained: Callable[[], Params]) -> None:
        """Adds the row of the policy after `number` rounds, unless it is there: greedy answers to
        held-out prompts, and the front of this run's policies so far."""
        study, workdir = self.study, self.study.workdir
        rows = [row for row in workdir.rows("eval.jsonl") if row.get("kind") == KIND]
        if any(row["round"] == number for row in rows):
            return
        study.clock.check()
        draw = study.sampler(*self._policy(trained()), 0.0)
        questions, at_once = study.held_out, study.own.prompts_at_once * study.own.samples
        answers: list[Answer] = []
        for first in range(0, len(questions), at_once):
            answers += draw([q.prompt for q in questions[first : first + at_once]], 0)
        lengths = study.lengths(questions, self.resolved)
        good = [study.scorer(q, a.assembly) for q, a in zip(questions, answers, strict=True)]
        speeds = [
            critical_path.speedup(n, max(a.steps, 1)) for n, a in zip(lengths, answers, strict=True)
        ]
        tokenizer = self.resolved.setup.tokenizer
        whole = [pairs.well_formed(a, tokenizer, tokenizer.stop_ids) for a in answers]
        point = (float(np.mean(good)), critical_path.geometric_mean(speeds))
        points = [(row["quality"], row["speedup_critical_path"]) for row in rows] + [point]
        counts = self.place.path / COUNTS
        workdir.append(
            "eval.jsonl",
            {
                "kind": KIND,
                "method": f"async {study.config.threads.positions}",
                "lambda": weight_name(study.own.quality_weight),
                "round": number,
                "quality": point[0],
                "speedup_critical_path": point[1],
                "well_formed": float(np.mean(whole)),
                "n": len(answers),
                "on_front": len(points) - 1 in front.front(points),
                "hypervolume": front.hypervolume(points),
                "skipped": json.loads(counts.read_text()) if number else {},
            },
        )


def weight_name(weight: float) -> float | str:
    """lambda as rows hold it: JSON has no infinity."""
    return "inf" if np.isinf(weight) else weight


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items())) or "none lost"
