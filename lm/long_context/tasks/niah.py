# SPDX-License-Identifier: Apache-2.0
"""RULER's needles in a haystack: values of keys, hidden in noise, in an essay or among other
needles.

A needle reads "One of the special magic numbers for KEY is: VALUE." Keys are adjective-noun pairs
or uuids, values are 7-digit numbers or uuids; all keys of a document differ, and all values.

| variant | haystack | key | value | keys | values a key | keys asked |
|---|---|---|---|---|---|---|
| single_1 | noise | word | number | 1 | 1 | 1 |
| single_2 | essay | word | number | 1 | 1 | 1 |
| single_3 | essay | word | uuid | 1 | 1 | 1 |
| multikey_1 | essay | word | number | 4 | 1 | 1 |
| multikey_2 | needles | word | number | 1 | 1 | 1 |
| multikey_3 | needles | uuid | uuid | 1 | 1 | 1 |
| multivalue | essay | word | number | 1 | 4 | 1 |
| multiquery | essay | word | number | 4 | 1 | 4 |

multivalue and multiquery take noise where there is no essay.
"""

import dataclasses
import functools
import random
from collections.abc import Callable

from lm.long_context import scoring, words
from lm.long_context.tasks import haystacks
from lm.long_context.tasks.task import Document, Question, Request, Task

_MAKERS: dict[str, Callable[[random.Random], str]] = {
    "words": words.pair,
    "numbers": words.number,
    "uuids": words.uuid,
}
_MOST_IN_ESSAY = 40  # depths


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the table."""

    haystack: str  # "noise", "essay", "needles", or "any": the essay if there is one, else noise
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


VARIANTS = {
    "niah_single_1": Variant("noise"),
    "niah_single_2": Variant("essay"),
    "niah_single_3": Variant("essay", values="uuids"),
    "niah_multikey_1": Variant("essay", num_keys=4),
    "niah_multikey_2": Variant("needles"),
    "niah_multikey_3": Variant("needles", keys="uuids", values="uuids"),
    "niah_multivalue": Variant("any", num_values=4),
    "niah_multiquery": Variant("any", num_keys=4, num_queries=4),
}


def generate(variant: Variant, rng: random.Random, size: int, request: Request) -> Document:
    """size: lines of noise, other needles, or words of the essay.

    With several questions there are needles for all of them, except among needles, where the
    haystack itself is asked about.
    """
    haystack = variant.haystack
    if haystack == "any":
        haystack = "essay" if request.essay else "noise"
    others = size if haystack == "needles" else 0
    asked = _num_questions(variant, haystack, size, request.questions)
    num_keys = max(variant.num_keys, variant.num_queries)
    if not others:
        num_keys = max(num_keys, variant.num_queries + asked - 1)
    make_key = functools.partial(_MAKERS[variant.keys], rng)
    make_value = functools.partial(_MAKERS[variant.values], rng)
    keys = words.distinct(make_key, num_keys + others)
    values = words.distinct(make_value, num_keys * variant.num_values + others)
    hidden = {
        key: values[i * variant.num_values : (i + 1) * variant.num_values]
        for i, key in enumerate(keys[:num_keys])
    }
    needles = [_needle(variant, key, value) for key in hidden for value in hidden[key]]
    rng.shuffle(needles)
    rest = dict(zip(keys[num_keys:], values[num_keys * variant.num_values :], strict=True))
    if haystack == "essay":
        text = haystacks.in_essay(rng, request.essay, size, needles)
    else:
        lines = [_needle(variant, *item) for item in rest.items()] or [haystacks.NOISE] * size
        text = haystacks.among_lines(rng, lines, needles)
    if variant.num_values > 1:  # an answer lists them as they come in the text
        hidden = {key: sorted(hidden[key], key=text.index) for key in hidden}
    groups = _asked(rng, list(hidden), list(rest), variant.num_queries, asked)
    known = hidden | {key: [value] for key, value in rest.items()}
    questions = tuple(_question(variant, group, known) for group in groups)
    return Document(_INSTRUCTION.format(kind=variant.values, text=text), questions)


_INSTRUCTION = (
    "The text below hides special magic {kind}. Keep them in mind, you will be asked about them."
    "\n{text}\n"
)


def _num_questions(variant: Variant, haystack: str, size: int, wanted: int) -> int:
    """How many questions there is room for."""
    if haystack == "needles":
        return min(wanted, size + 1)
    room = size if haystack == "noise" else _MOST_IN_ESSAY
    return max(1, min(wanted, room // variant.num_values - variant.num_queries + 1))


def _needle(variant: Variant, key: str, value: str) -> str:
    return f"One of the special magic {variant.values} for {key} is: {value}."


def _asked(
    rng: random.Random, keys: list[str], rest: list[str], queries: int, count: int
) -> list[list[str]]:
    """`count` groups of keys to ask for: hidden ones first, then those of the haystack."""
    rng.shuffle(keys)
    groups = [keys[i : i + queries] for i in range(min(count, len(keys) - queries + 1))]
    more = count - len(groups)
    return groups + [[key] for key in rng.sample(rest, more)] if more else groups


def _question(variant: Variant, keys: list[str], known: dict[str, list[str]]) -> Question:
    values = tuple(value for key in keys for value in known[key])
    kind, verb = variant.values, "are"
    if len(values) == 1:
        kind, verb = kind.removesuffix("s"), "is"
    names = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    return Question(
        text=f"Which special magic {kind} {verb} given for {names} in the text?",
        prefix=f"\nThe special magic {kind} for {names} {verb}:",
        outputs=values,
        answer=" " + ", ".join(values),
    )


_ESSAY = {"essay": "must", "any": "may"}

TASKS = tuple(
    Task(
        name=name,
        new_tokens=128,
        generate=functools.partial(generate, variant),
        score=scoring.fraction_found,
        # noise must offer each needle a line of its own
        smallest=max(variant.num_keys, variant.num_queries) * variant.num_values,
        essay=_ESSAY.get(variant.haystack, "no"),
    )
    for name, variant in VARIANTS.items()
)
