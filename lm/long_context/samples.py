# SPDX-License-Identifier: Apache-2.0
"""Samples of a task at a length in tokens: the largest haystack that fits, found as RULER does.

The largest size is sought on one probe and used for every sample; one that turns out longer takes
the largest that fits it, never less than the task's smallest form, so every search ends. (RULER
shrinks by a fixed number of lines there, which in bytes can be half of a context.)
"""

import dataclasses
import json
import pathlib
import random
from collections.abc import Callable, Iterable, Iterator

from lm.errors import RunError, UserError
from lm.long_context.tasks import Document, Request, Task
from lm.text.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question about one context. The prompt is `input` followed by `answer_prefix`."""

    index: int
    input: str
    outputs: tuple[str, ...]
    length: int  # tokens of the prompt, and those to generate
    answer_prefix: str  # after the assistant's header, where a chat template is used

    @property
    def prompt(self) -> str:
        return self.input + self.answer_prefix


def samples(
    task: Task,
    length: int,
    count: int,
    seed: int,
    tokenizer: Tokenizer,
    essay: tuple[str, ...] = (),
) -> list[Sample]:
    """`count` samples of at most `length` tokens, those to generate included; see `stream`."""
    return list(stream(task, length, count, seed, tokenizer, essay))


def stream(
    task: Task,
    length: int,
    count: int,
    seed: int,
    tokenizer: Tokenizer,
    essay: tuple[str, ...] = (),
) -> Iterator[Sample]:
    """The samples one by one; sample i is the same whatever `count` is.

    essay: words of the text that needles are hidden in (`read_essay`).

    Raises:
      UserError: a length below the task's smallest form, or an essay missing or of no use.
    """
    check_essay(task, essay)
    source = _Source(task, Request(length, _counter(tokenizer), essay=essay), seed)
    size = source.largest("probe", 0, source.floor)
    for index in range(count):
        sample = source.sample(index, index, size)
        if sample.length > length or task.search_each:
            sample = source.sample(index, index, source.largest(index, index, size))
        if sample.length > length:
            raise UserError(
                f"{task.name}: a length of {length} tokens is too short; with this tokenizer "
                f"and seed it takes at least {source.minimum(count)}"
            )
        yield sample


def check_essay(task: Task, essay: tuple[str, ...]) -> None:
    """Raises UserError when a task needs an essay and has none, or the reverse."""
    if task.essay == "must" and not essay:
        raise UserError(f"{task.name} hides its needles in an essay: name a text with --haystack")
    if task.essay == "no" and essay:
        raise UserError(f"{task.name} makes its own haystack: it takes no --haystack")


def read_essay(path: pathlib.Path) -> tuple[str, ...]:
    """The words of a text file. Raises UserError."""
    try:
        words = tuple(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not words:
        raise UserError(f"{path}: the haystack is empty")
    return words


def prompt_of(document: Document) -> str:
    """Context, first question and the beginning of its answer."""
    question = document.questions[0]
    return document.context + question.text + question.prefix


def write(path: pathlib.Path, made: Iterable[Sample]) -> tuple[int, int]:
    """A JSON line per sample, the file whole or not at all; (samples, longest length).

    Raises RunError when it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    number = longest = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for sample in made:
                file.write(json.dumps(dataclasses.asdict(sample)) + "\n")
                number, longest = number + 1, max(longest, sample.length)
        partial.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return number, longest


def _counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    return lambda text: len(tokenizer.encode(text))


class _Source:
    """The documents of one request by (number, size), and the search for the size."""

    def __init__(self, task: Task, request: Request, seed: int):
        self._task, self._request, self._seed = task, request, seed
        self.floor = task.floor(request)

    def sample(
        self, name: int | str, index: int, size: int, request: Request | None = None
    ) -> Sample:
        """name: with the seed it decides what is drawn."""
        request = dataclasses.replace(request or self._request, index=index)
        rng = random.Random(f"{self._task.name}:{self._seed}:{name}")
        document = self._task.generate(rng, size, request)
        question = document.questions[0]
        length = request.count(prompt_of(document)) + self._task.new_tokens
        text = document.context + question.text
        return Sample(index, text, question.outputs, length, question.prefix)

    def largest(self, name: int | str, index: int, start: int) -> int:
        """The size that fits while the next does not, sought from `start`; `floor` if none does."""

        def fits(size: int) -> bool:
            return self.sample(name, index, size).length <= self._request.length

        start = max(start, self.floor)
        if start == self.floor:
            start = self._guess(name, index)
        leap = 1
        if fits(start):
            low = start
            while fits(low + leap):
                low, leap = low + leap, 2 * leap
            high = low + leap
        else:
            high, low = start, max(start - leap, self.floor)
            while low > self.floor and not fits(low):
                high, leap = low, 2 * leap
                low = max(high - leap, self.floor)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _guess(self, name: int | str, index: int) -> int:
        """By the tokens of a unit, as two small sizes tell them; repeated at the size found."""
        size, short = self.floor + 8, self.sample(name, index, self.floor).length
        for _ in range(2):
            long = self.sample(name, index, size).length
            each = max((long - short) / (size - self.floor), 1e-3)
            size = self.floor + max(int((self._request.length - short) / each), 1)
        return size

    def minimum(self, count: int) -> int:
        """The least length that all of `count` samples fit into: some rules depend on it."""
        request, least = self._request, 0
        while True:
            lengths = [self.sample(i, i, self.floor, request).length for i in range(count)]
            if max(lengths) <= least:
                return least
            least = max(lengths)
            request = dataclasses.replace(request, length=least)
