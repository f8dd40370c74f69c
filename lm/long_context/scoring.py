# SPDX-License-Identifier: Apache-2.0
"""How an answer is scored, from 0 to 1: the published rules of RULER and InfiniteBench.

Each takes the generated text and the right answers.
"""

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")
_INTEGER = re.compile(r"[0-9]+")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def fraction_found(prediction: str, outputs: Sequence[str]) -> float:
    """RULER: the share of the answers that stand anywhere in the text, whatever their case."""
    text = _CONTROL.sub("\n", prediction.strip()).lower()
    return sum(output.lower() in text for output in outputs) / len(outputs)


def first_integer(prediction: str, outputs: Sequence[str]) -> float:
    """PassKey and Number string: the first run of digits is the answer, leading zeros included."""
    found = _INTEGER.search(prediction)
    return float(found is not None and found.group() == outputs[0])


def among_words(prediction: str, outputs: Sequence[str]) -> float:
    """KV retrieval: the value is one of the words, punctuation set aside."""
    return float(outputs[0] in _spaced(prediction, "\n:\"'.,?!{}").split())


def first_number(prediction: str, outputs: Sequence[str]) -> float:
    """Math.Find: the first number equals the answer; a sign is no part of it."""
    found = _NUMBER.search(prediction)
    return float(found is not None and float(found.group()) == float(outputs[0]))


def leading_integers(prediction: str, outputs: Sequence[str]) -> float:
    """Math.Calc: the share of the values that were given before the first wrong one."""
    right = 0
    for found, wanted in zip(_INTEGER.findall(prediction), outputs, strict=False):
        if int(found) != int(wanted):
            break
        right += 1
    return right / len(outputs)


def last_integer(prediction: str, outputs: Sequence[str]) -> float:
    """Code.Run: the last word is the integer."""
    words = _spaced(prediction, "\n.`'\":").split()
    try:
        return float(bool(words) and int(words[-1]) == int(outputs[0]))
    except ValueError:
        return 0.0


def _spaced(text: str, marks: str) -> str:
    return text.translate(str.maketrans(dict.fromkeys(marks, " ")))
