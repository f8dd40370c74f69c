# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with what it takes to judge methods on it: sets of questions, what is asked of whom,
answers and what they are worth.

Answers go to answers.jsonl as they come and rows to eval.jsonl, so that nothing that has ended is
done again. A row compares a method with dense attention: it is written once both have answered.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm import prompting, setup, tuned
from lm.config import SamplingConfig
from lm.errors import UserError
from lm.long_context import asking, decode, guard, longbench, quality, samples, tasks
from lm.long_context.asking import Questions
from lm.long_context.config import LongContextConfig
from lm.long_context.methods import DENSE, Methods
from lm.long_context.options import QUESTIONS, Budget, Options
from lm.long_context.policy import Method
from lm.long_context.program import Program
from lm.progress import Progress
from lm.prompting import Speaker
from lm.workdir import Workdir, provenance
from ops import dispatch

KIND = "long_context"
ROWS, ANSWERS = "eval.jsonl", "answers.jsonl"

# a method at a budget, None for dense attention
Name = tuple[str, int | None]
# by name the row and what it was made from
Found = Mapping[Name, tuple[dict[str, Any], dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One set of questions, written down before it is made."""

    name: str
    length: int
    seed: int
    count: int
    about: Mapping[str, Any]  # whatever else decides the questions
    make: Callable[[], Questions]  # the same ones every time
    agnostic: bool = False

    @property
    def label(self) -> str:
        seed = f" seed {self.seed}" if self.seed else ""
        return f"{self.name} {self.length}{seed}" + (" agnostic" if self.agnostic else "")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A method at a budget on a cell."""

    method: str
    budget: int | None  # None: dense
    policy: Method
    key: str  # digest of everything that decides the row


def opened(
    config: LongContextConfig,
    methods: Methods,
    path: pathlib.Path,
    options: Options,
    workdir: Workdir | None = None,
) -> "Judge":
    """A checkpoint to judge methods on. Raises UserError."""
    hf = setup.is_hf(path)
    load = prompting.load_hf if hf else prompting.load_workdir
    speaker = load(path, dtype=options.dtype)
    if workdir is None and not hf:
        workdir = Workdir(path)
    chat = options.chat
    chat = (hf and speaker.template is not None) if chat is None else chat
    return Judge(config, methods, options, speaker, str(path), chat, workdir)


class Judge:
    """A checkpoint with what it takes to judge methods on it."""

    def __init__(
        self,
        config: LongContextConfig,
        methods: Methods,
        options: Options,
        speaker: Speaker,
        checkpoint: str = "",
        chat: bool = False,
        workdir: Workdir | None = None,
    ):
        # further fields of a method's rows: what else than the checkpoint was judged
        self.about: Callable[[Method], Mapping[str, Any]] = lambda _: {}
        self.implementation = options.implementation or config.train.implementation or None
        self.config, self.options, self.speaker = config, options, speaker
        self.checkpoint, self.chat, self.workdir = checkpoint, chat, workdir
        self.hashes = tuned.hashes(speaker.params, speaker.tokenizer, speaker.template)
        if options.tuned:
            methods = methods.tuned(pathlib.Path(options.tuned), self.hashes)
        self.methods = methods
        self.names = options.methods or methods.usual
        for name in self.names:
            methods.check(name)
        self._answers, self._rows = {}, {}
        if workdir is not None:
            self._answers = {x["key"]: x for x in _kept(workdir, ANSWERS)}
            self._rows = {x["key"]: x for x in _kept(workdir, ROWS) if "key" in x}

    def cells(self) -> Iterator[Cell]:
        """All sets of questions. Raises UserError for unknown tasks."""
        for questions in self.options.questions:
            apart = questions == "agnostic"
            yield from self._files(apart) if self.options.data else self._tasks(apart)

    def _tasks(self, apart: bool) -> Iterator[Cell]:
        options, config = self.options, self.config.tasks
        found = [tasks.find(name) for name in options.tasks or config.names]
        essay = samples.read_essay(pathlib.Path(config.haystack)) if config.haystack else ()
        count = options.samples or config.eval_samples
        for task in found:
            samples.check_essay(task, essay if task.essay != "no" else ())
            about = {"essay": asking.fingerprint(essay) if task.essay != "no" else ""}
            if config.eval_tokens:
                about["new_tokens"] = config.eval_tokens
            for length in options.lengths or config.eval_lengths:
                for seed in options.seeds:
                    arguments = self.speaker, task, length, count, seed

                    @functools.cache
                    def make(arguments=arguments) -> Questions:
                        return asking.of_task(
                            *arguments,
                            chat=self.chat,
                            essay=essay,
                            apart=apart,
                            new_tokens=config.eval_tokens,
                        )

                    yield Cell(task.name, length, seed, count, about, make, apart)

    def _files(self, apart: bool) -> Iterator[Cell]:
        options, path = self.options, pathlib.Path(self.options.data)
        common = {"chat": self.chat, "capacity": options.capacity}
        if longbench.is_file(path):
            templates = None
            if options.templates:
                templates = longbench.read_templates(pathlib.Path(options.templates))
            for made in asking.of_longbench(
                self.speaker, path, **common, apart=apart, templates=templates
            ):
                yield _of_file(made, apart)
            return
        if options.templates:
            raise UserError("--templates are of --data in LongBench's format")
        if apart:
            raise UserError(
                f"--questions=agnostic: {path} does not tell prompts from questions, as a file in "
                "LongBench's format does"
            )
        yield _of_file(asking.of_file(self.speaker, path, options.max_new_tokens, **common), False)

    def plan(self, cell: Cell, budgets: Sequence[Budget]) -> dict[Name, Asked]:
        """What is measured on a cell, in the order of the names; dense attention always, first
        where it is not named. Raises UserError: a budget above the context, or too small for a
        method."""
        totals = [budget.total(self.methods, cell.length) for budget in budgets]
        for budget, total in zip(budgets, totals, strict=True):
            if total > cell.length:
                raise UserError(
                    f"a budget of {total} tokens ({budget.text}) is above the context of "
                    f"{cell.length}"
                )
        names = self.names if DENSE in self.names else (DENSE, *self.names)
        wanted = [(x, total) for x in names for total in ([None] if x == DENSE else totals)]
        return {pair: self._asked(cell, *pair) for pair in wanted}

    def _asked(self, cell: Cell, name: str, budget: int | None) -> Asked:
        policy = self.methods.build(name, budget)
        policy.check(self.speaker.model, None, cell.length)
        options = self.options
        apart = {"questions": "agnostic"} if cell.agnostic else {}
        key = asking.fingerprint(
            {
                **apart,
                "cell": [cell.name, cell.length, cell.seed, cell.count, cell.about, self.chat],
                "method": [name, repr(policy)],
                "hashes": self.hashes,
                "dtype": self.speaker.model.dtype,
                "implementation": self.implementation,
                "batch": options.batch_size if self.timed else 0,
                "timed": self.timed,
            }
        )
        return Asked(name, budget, policy, key)

    @property
    def timed(self) -> bool:
        return bool(self.options.data) if self.options.timed is None else self.options.timed

    def missing(self, plan: Mapping[Name, Asked]) -> list[Asked]:
        """What was not finished before."""
        done = self._rows.keys() & self._answers.keys()
        return [asked for asked in plan.values() if asked.key not in done]

    def answer(self, questions: Questions, asked: Asked, progress: Progress) -> None:
        """Puts questions to a method, unless that was done, and keeps what it wrote."""
        if "reads" in self._answers.get(asked.key, ()):
            progress.advance(len(questions.prompts))
            return
        method = self.method(asked.policy, questions.contexts)
        answers = asking.ask(method, questions, self.options.batch_size, progress)
        reads = answers.reads
        made = {
            "key": asked.key,
            "scores": asking.scores(questions, self.speaker, answers),
            "tokens": [ids.tolist() for ids in answers.tokens],
            "reads": None if np.isnan(reads).all() else float(np.nanmean(reads)),
            "guard": guard.summary(answers.guard) if answers.guard else None,
        }
        self._answers[asked.key] = made
        if self.workdir is not None:
            self.workdir.append(ANSWERS, made)

    def settle(self, questions: Questions, plan: Mapping[Name, Asked]) -> None:
        """Writes the rows of all that has answered, once dense attention has."""
        dense = plan[DENSE, None]
        if dense.key not in self._answers:
            return
        for asked in plan.values():
            if asked.key in self._rows or asked.key not in self._answers:
                continue
            row = self._row(questions, asked, self._compared(asked, dense))
            if row["accuracy"] is not None and asked is not dense:
                mine, theirs = (self._answers[x.key]["scores"] for x in (asked, dense))
                apart = quality.difference(mine, theirs)
                row |= {"to_dense": apart.mean, "to_dense_ci95": list(apart.ci95)}
            if self.timed:
                row |= self._timing(questions, asked.policy)
            self._rows[asked.key] = row
            if self.workdir is not None:
                self.workdir.append(ROWS, row)

    def found(self, plan: Mapping[Name, Asked]) -> Found:
        """Everything planned, once it is measured."""
        dense = plan[DENSE, None]
        return {name: (self._rows[x.key], self._compared(x, dense)) for name, x in plan.items()}

    def _compared(self, asked: Asked, dense: Asked) -> dict[str, Any]:
        """The answers with their agreement with dense attention's and their distance from them."""
        made = self._answers[asked.key]
        if "agreement" not in made:
            wanted = self._answers[dense.key]["tokens"]
            pairs = [
                tuple(np.array(ids, np.int32) for ids in pair)
                for pair in zip(made["tokens"], wanted, strict=True)
            ]
            made["agreement"] = [quality.agreement(*pair) for pair in pairs]
            made["edit_distance"] = [quality.edit_distance(*pair) for pair in pairs]
        return made

    def _row(self, questions: Questions, asked: Asked, made: Mapping[str, Any]) -> dict[str, Any]:
        scores = made["scores"]
        longest = max(len(prompt) for prompt in questions.prompts)
        return {
            "kind": KIND,
            "task": questions.name,
            "length": questions.length,
            "method": asked.method,
            "budget": questions.length if asked.budget is None else asked.budget,
            "accuracy": None if scores is None else float(np.mean(scores)),
            "agreement": float(np.mean(made["agreement"])),
            "ci95": None if scores is None else list(quality.interval(scores)),
            "agreement_ci95": list(quality.interval(made["agreement"])),
            "edit_distance": float(np.mean(made["edit_distance"])),
            "tokens_read": made["reads"],
            "guard": made.get("guard"),
            "samples": len(questions.prompts),
            "longest_prompt": longest,
            "seed": questions.seed,
            "questions": QUESTIONS[bool(questions.contexts)],
            "checkpoint": self.checkpoint,
            **self.about(asked.policy),
            "implementations": dispatch.served(),
            **provenance(),
            "key": asked.key,
        }

    def method(self, policy: Method, contexts: Sequence[int] = ()) -> asking.Continue:
        """A policy as something that continues prompts, greedily.

        contexts: so many tokens of prompt number n are all that it chooses by, where it drops.
        """
        speaker = self.speaker

        def method(prompts, new_tokens, capacity, numbers):
            after, sampling = None, SamplingConfig(max_new_tokens=new_tokens)
            if contexts and decode.drops(policy, sampling):
                cuts = [min(contexts[n], len(p) - 1) for p, n in zip(prompts, numbers, strict=True)]
                # what fills a batch up is one token long: asked again by itself
                after = [p[max(n, 0) :] for p, n in zip(prompts, cuts, strict=True)]
                prompts = [p[: max(n, 1)] for p, n in zip(prompts, cuts, strict=True)]
            made, statistics = decode.decode(
                speaker.model,
                speaker.params,
                prompts,
                sampling,
                policy,
                speaker.stop_ids,
                jax.random.key(0),
                implementation=self.implementation,
                valid_vocab=speaker.valid_vocab,
                capacity=capacity,
                indices=numbers,
                after=after,
            )
            steps = np.where(statistics.steps > 0, statistics.steps, np.nan)
            return made, statistics.reads.mean(axis=0) / steps, statistics.guard

        return method

    def _timing(self, questions: Questions, policy: Method) -> dict[str, float]:
        """Of the first batch; every sequence generates all its tokens."""
        speaker = self.speaker
        sampling = SamplingConfig(max_new_tokens=questions.new_tokens)
        program = Program(
            speaker.model,
            sampling,
            policy,
            implementation=self.implementation,
            valid_vocab=speaker.valid_vocab,
        )
        prompts = questions.prompts[: self.options.batch_size]
        timing = decode.measure(
            program, speaker.params, prompts, jax.random.key(0), questions.length
        )
        return timing.summary(len(prompts))


def _of_file(made: Questions, apart: bool) -> Cell:
    ids = [prompt.tolist() for prompt in made.prompts]
    about = {"prompts": asking.fingerprint([ids, made.outputs]), "new": made.new_tokens}
    return Cell(made.name, made.length, 0, len(ids), about, lambda: made, apart)


def _kept(workdir: Workdir, name: str) -> list[dict[str, Any]]:
    """The rows of a file; a line that was cut short is taken out, lest the next be added to it."""
    rows, file = workdir.rows(name), workdir.path / name
    if file.exists() and file.read_bytes()[-1:] not in (b"", b"\n"):
        workdir.write(name, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
