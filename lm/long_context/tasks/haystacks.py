# SPDX-License-Identifier: Apache-2.0
"""Where needles are hidden: lines of noise, or the sentences of an essay."""

import random
import re
from collections.abc import Sequence

# five short sentences that say nothing
NOISE = "The grass is green. The sky is blue. The sun is yellow. Off we go. And home once more."
_DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # per cent of the essay
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def among_lines(rng: random.Random, lines: Sequence[str], needles: Sequence[str]) -> str:
    """The needles before as many different lines, in descending order of those."""
    places = sorted(rng.sample(range(len(lines)), len(needles)), reverse=True)
    out = list(lines)
    for place, needle in zip(places, needles, strict=True):
        out.insert(place, needle)
    return "\n".join(out)


def in_order(rng: random.Random, lines: Sequence[str], needles: Sequence[str]) -> list[str]:
    """The lines with the needles among them, at random places but in their order."""
    places = sorted(rng.sample(range(len(lines)), len(needles)))
    out = list(lines)
    for shift, (place, needle) in enumerate(zip(places, needles, strict=True)):
        out.insert(place + shift, needle)
    return out


def in_essay(rng: random.Random, words: Sequence[str], size: int, needles: Sequence[str]) -> str:
    """The first `size` words of an essay, repeated if it is short, with needles between sentences.

    Each needle has its own of 40 depths, evenly spread from the first sentence to after the last;
    there are at most 40.
    """
    repeated = list(words) * -(-size // len(words))
    sentences = _SENTENCE_END.split(" ".join(repeated[:size]))
    depths = sorted(rng.sample(_DEPTHS, len(needles)))
    parts, start = [], 0
    for depth, needle in zip(depths, needles, strict=True):
        end = len(sentences) * depth // 100
        parts += [*sentences[start:end], needle]
        start = end
    return " ".join([*parts, *sentences[start:]])
