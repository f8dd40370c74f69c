# SPDX-License-Identifier: Apache-2.0
"""What a long-context task is: a generator of documents by size, and a scorer."""

import dataclasses
import random
from collections.abc import Callable, Sequence

SHORT = 4096  # tokens; below it cwe repeats words less often
_ESSAY_WORDS = 20  # of the shortest essay: a sentence or two


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked about a context, and what a perfect model writes."""

    text: str  # follows the context, on a line of its own
    prefix: str  # begins the answer, after the end of the prompt or of the chat turn
    outputs: tuple[str, ...]  # the right answers
    answer: str  # the whole answer, without the prefix


@dataclasses.dataclass(frozen=True)
class Document:
    """A context that can be asked about; no question knows of the others."""

    context: str  # instruction and haystack
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Request:
    """What a generator is told beside the size of its haystack."""

    length: int  # tokens aimed at, those to generate included: some rules depend on it
    count: Callable[[str], int]  # tokens of a text
    index: int = 0  # of the sample: some tasks spread the answer's place evenly over the samples
    questions: int = 1  # at most so many; with more than one, more needles where a haystack has few
    essay: tuple[str, ...] = ()  # words of the text that needles are hidden in


@dataclasses.dataclass(frozen=True)
class Task:
    """One task by its published rules."""

    name: str
    new_tokens: int  # tokens that an answer may take
    generate: Callable[[random.Random, int, Request], Document]  # the int: size of the haystack
    score: Callable[[str, Sequence[str]], float]  # (prediction, outputs) -> 0..1
    smallest: int  # the smallest haystack that holds what is hidden
    essay: str = "no"  # whether needles "may", "must" or do "no"t lie in a text of the user's
    search_each: bool = False  # the largest haystack is sought for each sample, not for one

    def floor(self, request: Request) -> int:
        """The smallest haystack, in units of the one that is searched."""
        return _ESSAY_WORDS if request.essay else self.smallest
