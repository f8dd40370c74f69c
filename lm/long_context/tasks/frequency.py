# SPDX-License-Identifier: Apache-2.0
"""RULER's aggregation over the whole context: the most common words (cwe), and the most frequent
coded words of a Zipf-like text (fwe)."""

import math
import random

from lm.long_context import scoring, words
from lm.long_context.tasks.task import SHORT, Document, Question, Request, Task

_COMMON = 10  # words asked for
_CODED_LETTERS = 6
_ZETA_2 = math.pi**2 / 6  # sum of i^-2
_CLEAR = 73  # words of fwe from which rank 4 is always more frequent than rank 5

_CWE = (
    "Here is a numbered list of words, some of which come up more often than the others. Remember "
    "the most frequent ones.\n{text}\n"
)
_CWE_ASK = f"Question: Which {_COMMON} words of the list are the most frequent?"
_CWE_PREFIX = f"\nAnswer: The {_COMMON} most frequent words of the list are:"
_FWE = (
    "The text below is in code: its words mean nothing to us, and '...' is only noise. Count how "
    "often each coded word comes up.\n{text}\n"
)
_FWE_ASK = "Question: Not counting '...', which three coded words are the most frequent?"
_FWE_PREFIX = "\nAnswer: The three most frequent coded words are:"


def common_words(rng: random.Random, size: int, request: Request) -> Document:
    """size: different words. Ten are common; one solved example comes first."""
    short = request.length < SHORT
    text, answers = _word_list(rng, 20 if short else 40, *((3, 1) if short else (10, 3)))
    solved = f"{_CWE.format(text=text)}{_CWE_ASK}{_CWE_PREFIX} {', '.join(answers)}\n\n"
    text, answers = _word_list(rng, size, *((6, 1) if short else (30, 3)))
    question = Question(_CWE_ASK, _CWE_PREFIX, answers, " " + ", ".join(answers))
    return Document(solved + _CWE.format(text=text), (question,))


def _word_list(
    rng: random.Random, size: int, common: int, uncommon: int
) -> tuple[str, tuple[str, ...]]:
    """A numbered list of `size` different words, ten of them `common` times, the others
    `uncommon`, and those ten."""
    known = words.vocabulary()
    chosen = rng.sample(known, min(size, len(known)))
    chosen += [f"word_{i}" for i in range(size - len(chosen))]  # there are no more words
    answers = tuple(chosen[:_COMMON])
    listed = [*answers] * common + chosen[_COMMON:] * uncommon
    rng.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), answers


def frequent_words(rng: random.Random, size: int, request: Request) -> Document:
    """size: N, where the word of rank i comes int(N i^-2 / zeta(2)) times."""
    num_words = max((request.length - 50) // 50, 4)
    ranked = words.distinct(lambda: words.letters(rng, _CODED_LETTERS), num_words)
    rng.shuffle(ranked)
    ranked[0] = "..."
    drawn = []
    for rank, word in enumerate(ranked, 1):
        times = int(size * rank**-2.0 / _ZETA_2)
        if not times:
            break
        drawn += [word] * times
    rng.shuffle(drawn)
    answers = tuple(ranked[1:4])
    question = Question(_FWE_ASK, _FWE_PREFIX, answers, " " + ", ".join(answers))
    return Document(_FWE.format(text=" ".join(drawn)), (question,))


TASKS = (
    Task(
        name="cwe",
        new_tokens=120,
        generate=common_words,
        score=scoring.fraction_found,
        smallest=_COMMON + 1,
    ),
    Task(
        name="fwe",
        new_tokens=50,
        generate=frequent_words,
        score=scoring.fraction_found,
        smallest=_CLEAR,
        search_each=True,
    ),
)
