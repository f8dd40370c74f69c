# SPDX-License-Identifier: Apache-2.0
"""InfiniteBench's retrieval: a pass key, a number string, the value of a key in a JSON object."""

import json
import random

from lm.long_context import scoring, words
from lm.long_context.tasks import haystacks
from lm.long_context.tasks.task import Document, Question, Request, Task

_DEPTHS = 59  # places of the key, from before the first line to after the last
_DEPTH_STRIDE = 36  # prime to it: samples that follow each other lie far apart
_PAIR_PLACES = 500
_PAIR_STRIDE = 309

_HIDDEN = (
    "One fact that matters is hidden in the text below, most of which does not. Find it and keep "
    "it in mind, you will be asked about it.\n{text}\n"
)
_JSON = "Here is a JSON object.\n{text}\n"


def pass_key(rng: random.Random, size: int, request: Request) -> Document:
    """size: lines of noise. Five digits that may begin with 0, stated twice."""
    key = words.digits(rng, 5)
    fact = f"The pass key is {key}. Do not forget it. {key} is the pass key."
    question = Question("What is the pass key?", "\nThe pass key is", (key,), f" {key}")
    return Document(_HIDDEN.format(text=_at_depth(fact, size, request.index)), (question,))


def number_string(rng: random.Random, size: int, request: Request) -> Document:
    """size: lines of noise. Ten digits, five of them doubles of a neighbour."""
    digits = list(words.digits(rng, 5))
    for _ in range(5):
        place = rng.randrange(len(digits))
        digits.insert(place, digits[place])
    number = "".join(digits)
    fact = f"The sequence of digits is {number}. Do not forget it. {number} is the sequence."
    question = Question(
        "What is the sequence of digits?", "\nThe sequence of digits is", (number,), f" {number}"
    )
    return Document(_HIDDEN.format(text=_at_depth(fact, size, request.index)), (question,))


def _at_depth(fact: str, size: int, index: int) -> str:
    """Noise with the fact at one of the depths; every 59 samples take each of them once."""
    depth = index * _DEPTH_STRIDE % _DEPTHS
    lines = [haystacks.NOISE] * size
    lines.insert(size * depth // (_DEPTHS - 1), fact)
    return "\n".join(lines)


def json_values(rng: random.Random, size: int, request: Request) -> Document:
    """size: pairs of uuids. Every 500 samples ask for places evenly spread over the object."""
    made = words.distinct(lambda: words.uuid(rng), 2 * size)
    keys, values = made[::2], made[1::2]
    first = request.index * _PAIR_STRIDE % _PAIR_PLACES * size // _PAIR_PLACES
    asked = [first]
    if request.questions > 1:
        others = [i for i in range(size) if i != first]
        asked += rng.sample(others, min(request.questions - 1, len(others)))
    questions = tuple(
        Question(
            text=f'What is the value of the key "{keys[i]}"?',
            prefix=f'\nThe value of "{keys[i]}":',
            outputs=(values[i],),
            answer=f' "{values[i]}"',
        )
        for i in asked
    )
    text = json.dumps(dict(zip(keys, values, strict=True)))
    return Document(_JSON.format(text=text), questions)


TASKS = (
    Task(
        name="passkey",
        new_tokens=6,
        generate=pass_key,
        score=scoring.first_integer,
        smallest=1,
    ),
    Task(
        name="number_string",
        new_tokens=12,
        generate=number_string,
        score=scoring.first_integer,
        smallest=1,
    ),
    Task(
        name="kv_retrieval",
        new_tokens=50,
        generate=json_values,
        score=scoring.among_words,
        smallest=1,
    ),
)
