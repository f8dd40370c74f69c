# SPDX-License-Identifier: Apache-2.0
"""Training documents of the tasks, made on the fly by index: the same ones in every run and resume.

A document is one context and up to `tasks.questions` questions about it, each with its answer.
Questions are branches of a tree: each starts at the position after the context, sees the context
and itself, and no other question. A row of many branches therefore trains exactly what as many
samples would, for the price of one context, and a small model needs those many answers: it learns
to retrieve only from tokens that it has to retrieve.
"""

import bisect
import dataclasses
import functools
import operator
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import grain
import numpy as np

from lm.data import packing, processes
from lm.data.layout import Layout
from lm.errors import UserError
from lm.long_context import samples, tasks
from lm.long_context.config import TasksConfig
from lm.long_context.tasks import Document, Request, Task
from lm.text.tokenizers import Tokenizer

_ENDLESS = 1 << 40  # documents
_CYCLE = 500 * 59 * 7  # indices after which the tasks repeat the places of their answers
_PROBES = 4  # documents from which the tokens of a task are told
_ATTEMPTS = 50  # each 10% shorter

Branch = tuple[np.ndarray, np.ndarray]  # tokens of a question with its prefix, and of its answer


@dataclasses.dataclass(frozen=True)
class Scale:
    """Tokens of a task's training documents."""

    start: float  # of a context: start + size * each + (questions - 1) * needle
    each: float
    needle: float
    branch: float  # of a question with its answer


class Author:
    """Writes training documents of tasks."""

    def __init__(self, config: TasksConfig, tokenizer: Tokenizer):
        """Raises UserError for tasks that are unknown, or lack their essay."""
        self.tasks = [tasks.find(name) for name in config.names]
        self._essay = _essay(config, self.tasks)
        self._tokenizer = tokenizer
        self._end = [] if tokenizer.eos is None else [tokenizer.token_id(tokenizer.eos)]
        self._count = lambda text: len(tokenizer.encode(text))

    def floor(self, task: Task) -> int:
        """The smallest haystack."""
        return task.floor(Request(0, self._count, essay=self._essay_of(task)))

    def document(
        self, task: Task, rng: random.Random, size: int, questions: int, length: int
    ) -> Document:
        """What evaluation spreads evenly over its samples is drawn here.

        length: tokens aimed at, on which some rules depend.
        """
        index = rng.randrange(_CYCLE)
        request = Request(length, self._count, index, questions, self._essay_of(task))
        return task.generate(rng, size, request)

    def encode(self, document: Document) -> tuple[np.ndarray, list[Branch]]:
        """The tokens of the context and of each question with its answer, which ends the text."""
        texts = [document.context]
        for question in document.questions:
            texts += [question.text + question.prefix, question.answer]
        context, *rest = self._tokenizer.encode_batch(texts)
        answers = [np.append(answer, self._end).astype(np.int32) for answer in rest[1::2]]
        return context, list(zip(rest[::2], answers, strict=True))

    def _essay_of(self, task: Task) -> tuple[str, ...]:
        return () if task.essay == "no" else self._essay


def _essay(config: TasksConfig, named: Sequence[Task]) -> tuple[str, ...]:
    """The words of `tasks.haystack`; refused where a task lacks it, or no task takes it."""
    essay = samples.read_essay(pathlib.Path(config.haystack)) if config.haystack else ()
    for task in named:
        if task.essay == "must" and not essay:
            raise UserError(f"{task.name} hides its needles in an essay: set tasks.haystack")
    if essay and all(task.essay == "no" for task in named):
        raise UserError("tasks.haystack is an essay, which no task of tasks.names takes")
    return essay


class Documents(Sequence[Layout]):
    """The layouts of a run's documents by index."""

    def __init__(
        self,
        config: TasksConfig,
        seed: int,
        tokenizer: Tokenizer,
        seq_len: int,
        process: tuple[int, int] = (0, 1),
    ):
        """seq_len: S, the tokens of a row. process: (index, count) of the host, which takes every
        count-th document.

        Raises UserError for tasks that are unknown, lack their essay or do not fit.
        """
        if config.max_length > seq_len:
            raise UserError(
                f"tasks.max_length={config.max_length} exceeds rows of data.seq_len={seq_len}"
            )
        self._config, self._seed, self._fingerprint = config, seed, tokenizer.fingerprint
        self._seq_len, self._process = seq_len, process
        self._author = Author(config, tokenizer)
        self._scales = [self._scale(task) for task in self._author.tasks]

    def __len__(self) -> int:
        return _ENDLESS

    def __repr__(self) -> str:
        # a data iterator's saved position names its source
        return f"Documents({self._config}, {self._seed}, {self._seq_len}, {self._fingerprint})"

    def __getitem__(self, index: SupportsIndex) -> Layout:
        first, count = self._process
        number = first + count * operator.index(index)
        for attempt in range(_ATTEMPTS):
            rng = random.Random(f"train:{self._seed}:{number}:{attempt}")
            made = self._make(rng, number, shrink=0.9**attempt)
            if made is not None:
                return made
        raise UserError(f"tasks.max_length={self._config.max_length} fits no document")

    def _make(self, rng: random.Random, number: int, shrink: float) -> Layout | None:
        """A document whose samples have at most `max_length` tokens; None when it is longer."""
        config = self._config
        which = rng.randrange(len(self._scales))
        task, scale = self._author.tasks[which], self._scales[which]
        length = int(rng.randint(config.min_length, longest(config, number)) * shrink)
        most = min(config.questions, 1 + int((self._seq_len - length) / scale.branch))
        if scale.needle:  # each needs a line of the haystack, and lines that hide it
            inside = (length - scale.start - scale.branch) / (scale.needle + scale.each)
            most = min(most, max(1, int(inside)))
        # a third of the documents is asked once, as in evaluation: one needle in its noise
        questions = rng.choice((1, most, most))
        needles = scale.needle * (questions - 1)
        size = int((length - scale.start - scale.branch - needles) / scale.each)
        size = max(size, self._author.floor(task))
        document = self._author.document(task, rng, size, questions, length)
        context, branches = self._author.encode(document)
        sizes = [len(asked) + len(answer) for asked, answer in branches]
        # what does not fit a row loses its last questions
        ends = np.cumsum([len(context), *sizes]).tolist()
        kept = bisect.bisect_right(ends, self._seq_len) - 1
        if kept < 1 or len(context) + max(sizes[:kept]) > config.max_length:
            return None
        return layout(context, branches[:kept], config.text_weight)

    def _scale(self, task: Task) -> Scale:
        """Raises UserError when not even the smallest document fits."""
        floor, most = self._author.floor(task), self._config.max_length

        def tokens(size: int, questions: int) -> np.ndarray:
            """Of the context and of a branch."""
            total = np.zeros(2)
            for probe in range(_PROBES):
                rng = random.Random(f"scale:{self._seed}:{probe}")
                document = self._author.document(task, rng, size, questions, most)
                context, ((asked, answer), *_) = self._author.encode(document)
                total += len(context), len(asked) + len(answer)
            return total / _PROBES

        smallest, large = tokens(floor, 1), floor + 32
        if smallest.sum() > most:
            raise UserError(
                f"tasks.max_length={most} is too short for {task.name}: its smallest sample "
                f"takes about {smallest.sum():.0f} tokens"
            )
        context, branch = tokens(large, 1)
        each = max((context - smallest[0]) / 32, 1e-3)
        needle = max(tokens(large, 2)[0] - context, 0.0)
        return Scale(context - each * large, each, needle, branch)


def longest(config: TasksConfig, number: int) -> int:
    """The bound in tokens on document `number`."""
    if number >= config.growth:
        return config.max_length
    if config.pace == "doublings":
        # a document takes tokens as the bound does: where its reciprocal falls evenly, time is log
        share = number / config.growth
        return int(1 / ((1 - share) / config.min_length + share / config.max_length))
    grown = (config.max_length - config.min_length) * number // config.growth
    return config.min_length + grown


def layout(context: np.ndarray, branches: Sequence[Branch], text_weight: float) -> Layout:
    """A context [n] int32 and its questions as a tree; an answer's tokens weigh 1.

    `edge_turn_weights` counts answers alone, each as one: the loss per turn is that of retrieval.
    """
    first = len(context)
    tokens, positions, until = [context], [np.arange(first)], []
    rows, targets = [np.arange(first - 1)], [context[1:]]
    weights, turns = [np.full(first - 1, text_weight)], [np.zeros(first - 1)]
    owners, start = [np.zeros(first - 1, np.int32)], first
    for number, (asked, answer) in enumerate(branches):
        own = np.concatenate([asked, answer])
        before = start + np.arange(-1, len(own) - 1)
        before[0] = first - 1  # the context is what a question follows, wherever its row is
        tokens.append(own)
        positions.append(first + np.arange(len(own)))
        until.append(np.full(len(own), start + len(own)))
        rows.append(before)
        targets.append(own)
        weights.append(np.repeat([text_weight, 1.0], [len(asked), len(answer)]))
        turns.append(np.repeat([0.0, 1 / len(answer)], [len(asked), len(answer)]))
        owners.append(np.full(len(own), number))
        start += len(own)
    weight = np.concatenate(weights)
    kept = weight > 0
    edge_rows, edge_targets = np.concatenate(rows)[kept], np.concatenate(targets)[kept]
    children = np.arange(1, start)[kept]
    return Layout(
        tokens=np.concatenate(tokens).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        until=np.concatenate([np.full(first, start), *until]).astype(np.int32),
        edge_rows=edge_rows.astype(np.int32),
        edge_targets=edge_targets.astype(np.int32),
        edge_weights=weight[kept].astype(np.float32),
        edge_turn_weights=np.concatenate(turns)[kept].astype(np.float32),
        edge_children=children.astype(np.int32),
        edge_turns=np.concatenate(owners)[kept].astype(np.int32),
    )


class _ToGroup(grain.transforms.Map):
    """A layout, with counts of what it holds."""

    def map(self, made: Layout) -> packing.Group:
        answers = int(made.edge_turns.max(initial=0)) + 1
        return packing.Group([made], {"documents": 1, "answers": answers})


def rows(
    config: TasksConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    seq_len: int,
    window: int,
    process: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Packed rows without an end; `packing.batches` follows.

    process: (index, count) of the host.
    """
    make = functools.partial(Documents, config, seed, tokenizer, seq_len, process)
    workers = processes.workers()
    dataset = grain.MapDataset.source(processes.Beside(make, workers) if workers else make())
    # without processes, threads help a little: tokenizers leave Python's lock while they encode
    read = grain.ReadOptions(num_threads=1 if workers else 8, prefetch_buffer_size=64)
    return packing.PackedRows(dataset.map(_ToGroup()).to_iter_dataset(read), seq_len, window)


def texts(config: TasksConfig, tokenizer: Tokenizer, seed: int, count: int) -> Iterator[str]:
    """Whole documents of each task in turn, to learn a tokenizer from."""
    author = Author(config, tokenizer)
    for number in range(count):
        task = author.tasks[number % len(author.tasks)]
        rng = random.Random(f"texts:{seed}:{number}")
        size = author.floor(task) + rng.randrange(64)
        document = author.document(task, rng, size, config.questions, config.max_length)
        asked = (q.text + q.prefix + q.answer for q in document.questions)
        yield document.context + "\n".join(asked)
