# SPDX-License-Identifier: Apache-2.0
"""InfiniteBench's computation over the context: an order statistic of a list, the intermediate
values of a long sum, a chain of functions."""

import random

from lm.long_context import scoring
from lm.long_context.tasks.task import Document, Question, Request, Task

_ORDERS = ("", "second ", "third ")
# (what is asked, from which end, how many distinct values before it); None: the median
STATISTICS: tuple[tuple[str, int, int | None], ...] = (
    *((f"{order}largest", -1, i) for i, order in enumerate(_ORDERS)),
    *((f"{order}smallest", 1, i) for i, order in enumerate(_ORDERS)),
    ("median", 0, None),
)
_LEAST_VALUES = 5  # different ones that can occur
VALUES = 64  # of a sum that are asked for
LAYERS = (2, 4, 6, 8, 10)
_ARGUMENT = 10  # the call's lies in -10..10
_OFFSETS = (-12, 17)

_FIND = "Below is a list of integers.\n{text}\n"
_CALCULATE = "Below is a long sum.\n{text}\n"
_RUN = "Below are Python functions, each of which calls at most one other.\n{text}\n"


def find_number(rng: random.Random, size: int, request: Request) -> Document:
    """size: integers of 0..99, one fewer for an even number of them and the median.

    The upper bound is random where large ones are asked for, the lower bound where small ones are,
    both for the median: otherwise every long list would have the same answer. "Second" and "third"
    are among the different values.
    """
    asked, end, skipped = STATISTICS[request.index % len(STATISTICS)]
    low, high = 0, 99
    if end <= 0:
        high = rng.randint(_LEAST_VALUES - 1 if end else 50, 99)
    if end >= 0:
        low = rng.randint(0, 100 - _LEAST_VALUES if end else 49)
    count = size - (skipped is None and size % 2 == 0)
    numbers = [rng.randint(low, high) for _ in range(count)]
    while skipped is not None and len(set(numbers)) <= skipped:
        numbers[rng.randrange(count)] = rng.randint(low, high)
    if skipped is None:
        answer = str(sorted(numbers)[count // 2])
    else:
        answer = str(sorted(set(numbers))[skipped if end > 0 else -1 - skipped])
    text = ", ".join(map(str, numbers))
    different = " (equal ones count once)" if skipped else ""
    question = Question(
        f"What is the {asked} number of the list{different}?",
        f"\nThe {asked} number is",
        (answer,),
        f" {answer}",
    )
    return Document(_FIND.format(text=f"[{text}]"), (question,))


def calculate(rng: random.Random, size: int, request: Request) -> Document:
    """size: numbers of 0..99, added or subtracted so that every intermediate value is one, too.

    All intermediate values are asked for where it was published, which takes an answer as long as
    the context; here it is the first 64 of them, the first number among these.
    """
    del request
    value = rng.randint(0, 99)
    text, values = [str(value)], [value]
    for _ in range(size - 1):
        plus = rng.random() < 0.5
        term = rng.randint(0, 99 - value if plus else value)
        value += term if plus else -term
        text.append(f"{'+' if plus else '-'} {term}")
        values.append(value)
    asked = tuple(map(str, values[:VALUES]))
    question = Question(
        f"What are the first {len(asked)} intermediate values of the sum, from its first number "
        "on?",
        "\nThe values are",
        asked,
        f" {', '.join(asked)}",
    )
    return Document(_CALCULATE.format(text=" ".join(text)), (question,))


def run_code(rng: random.Random, size: int, request: Request) -> Document:
    """size: one-line functions, in 2, 4, 6, 8 or 10 layers by the sample's index.

    Each returns a random function of the next layer, of its argument, plus an offset; those of the
    last layer add to the argument itself. A function of the first layer is called.
    """
    depth = LAYERS[request.index % len(LAYERS)]
    numbers = rng.sample(range(size), size)
    layers = [numbers[i::depth] for i in range(depth)]
    calls: dict[int, tuple[int | None, int]] = {}
    for i, layer in enumerate(layers):
        for number in layer:
            inner = rng.choice(layers[i + 1]) if i + 1 < depth else None
            calls[number] = inner, rng.randint(*_OFFSETS)
    lines = [_function(number, *calls[number]) for number in range(size)]
    questions = tuple(
        _call(number, rng.randint(-_ARGUMENT, _ARGUMENT), calls)
        for number in rng.sample(layers[0], min(request.questions, len(layers[0])))
    )
    return Document(_RUN.format(text="\n".join(lines)), questions)


def _function(number: int, inner: int | None, offset: int) -> str:
    called = "x" if inner is None else f"func_{inner}(x)"
    sign = "-" if offset < 0 else "+"
    return f"def func_{number}(x): return {called} {sign} {abs(offset)}"


def _call(number: int, argument: int, calls: dict[int, tuple[int | None, int]]) -> Question:
    value, current = argument, number
    while current is not None:
        current, offset = calls[current]
        value += offset
    return Question(
        f"What does func_{number}({argument}) return?",
        f"\nfunc_{number}({argument}) returns",
        (str(value),),
        f" {value}",
    )


TASKS = (
    Task(
        name="math_find",
        new_tokens=3,
        generate=find_number,
        score=scoring.first_number,
        smallest=_LEAST_VALUES,
        search_each=True,  # bounds and with them digits differ from sample to sample
    ),
    Task(
        name="math_calc",
        new_tokens=4 * VALUES,  # in bytes, too
        generate=calculate,
        score=scoring.leading_integers,
        smallest=2,
    ),
    Task(
        name="code_run",
        new_tokens=5,
        generate=run_code,
        score=scoring.last_integer,
        smallest=max(LAYERS),
    ),
)
