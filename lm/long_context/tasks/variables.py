# SPDX-License-Identifier: Apache-2.0
"""RULER's variable tracking: one chain of four hops, its five variables all worth the first's
value.

A solved example of at most 500 tokens comes first, with names and a value of its own in every
sample.
"""

import functools
import itertools
import random
import string
from collections.abc import Callable

from lm.long_context import scoring, words
from lm.long_context.tasks import haystacks
from lm.long_context.tasks.task import Document, Question, Request, Task

_HOPS = 4
_VARIABLES = _HOPS + 1
_EXAMPLE_TOKENS = 500
_EXAMPLE_STEP = 5  # lines of noise
_EXAMPLE_LETTERS = 3
_LETTERS = 5
_INSTRUCTION = "Follow the assignments of variables that are hidden in this text.\n"
_ASK = "Question: Which variables of the text are worth {value}?"
_PREFIX = "\nAnswer: The {count} variables that are worth {value} are:"


def generate(rng: random.Random, size: int, request: Request) -> Document:
    """size: lines of noise. Several questions are about as many chains."""
    chains = max(1, min(request.questions, size // _VARIABLES))
    example = _example(rng, _example_size(request.count), request.count)
    text, questions = _track(rng, size, _LETTERS, chains)
    return Document(f"{example}\n{_INSTRUCTION}{text}\n", questions)


def _track(
    rng: random.Random, size: int, letters: int, chains: int
) -> tuple[str, tuple[Question, ...]]:
    """Lines of noise with chains of assignments, and a question about each chain."""
    make = functools.partial(words.letters, rng, letters, string.ascii_uppercase)
    names = words.distinct(make, _VARIABLES * chains)
    values = words.distinct(lambda: str(rng.randint(10000, 99998)), chains)
    lines = [haystacks.NOISE] * size
    questions = []
    for i, value in enumerate(values):
        chain = names[i * _VARIABLES : (i + 1) * _VARIABLES]
        assignments = [f"VAR {chain[0]} = {value}"]
        hops = itertools.pairwise(chain)
        assignments += [f"VAR {name} = VAR {before}" for before, name in hops]
        lines = haystacks.in_order(rng, lines, assignments)
        questions.append(
            Question(
                text=_ASK.format(value=value),
                prefix=_PREFIX.format(value=value, count=_VARIABLES),
                outputs=tuple(chain),
                answer=" " + " ".join(chain),
            )
        )
    return "\n".join(lines), tuple(questions)


def _example(rng: random.Random, size: int, count: Callable[[str], int]) -> str:
    """A solved example; names may tokenise worse than those that the size was found with."""
    while True:
        text, (question,) = _track(rng, size, _EXAMPLE_LETTERS, 1)
        solved = f"{_INSTRUCTION}{text}\n{question.text}{question.prefix}{question.answer}\n"
        if size <= _VARIABLES or count(solved) <= _EXAMPLE_TOKENS:
            return solved
        size = max(size - _EXAMPLE_STEP, _VARIABLES)


@functools.lru_cache(maxsize=16)
def _example_size(count: Callable[[str], int]) -> int:
    """The most lines of noise of an example, or the fewest that hold a chain."""
    size = _VARIABLES
    while count(_example(random.Random("example"), size + 1, lambda _: 0)) <= _EXAMPLE_TOKENS:
        size += 1
    return size


TASKS = (
    Task(
        name="vt",
        new_tokens=30,
        generate=generate,
        score=scoring.fraction_found,
        smallest=_VARIABLES,
    ),
)
