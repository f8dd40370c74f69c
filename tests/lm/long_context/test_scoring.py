# SPDX-License-Identifier: Apache-2.0
"""Scorers on cases worked by hand."""

import pytest

from lm.long_context import scoring


@pytest.mark.parametrize(
    ("prediction", "outputs", "score"),
    [
        (" 1234567.", ("1234567",), 1.0),
        (" 1234567 and 7654321", ("1234567", "7654321", "1111111", "2222222"), 0.5),
        (" ABCDE", ("abcde",), 1.0),
        ("it is Plain\x00 here", ("plain\n here",), 1.0),  # control characters become line ends
        ("", ("1",), 0.0),
        ("123456", ("1234567",), 0.0),
        ("91234567", ("1234567",), 1.0),  # a substring: the published rule
    ],
)
def test_fraction_found(prediction, outputs, score):
    assert scoring.fraction_found(prediction, outputs) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (" 01234", 1.0),
        ("The key: 01234, not 99999", 1.0),
        (" 1234", 0.0),
        (" 012345", 0.0),
        ("99999 01234", 0.0),
        ("none", 0.0),
    ],
)
def test_first_integer(prediction, score):
    assert scoring.first_integer(prediction, ("01234",)) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (' "ab-12".', 1.0),
        ('{"x": "ab-12"}', 1.0),
        ("ab-12!", 1.0),
        ("ab-123", 0.0),
        ("ab 12", 0.0),
        ("", 0.0),
    ],
)
def test_among_words(prediction, score):
    assert scoring.among_words(prediction, ("ab-12",)) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (" 17", 1.0),
        ("17.0 or 18", 1.0),
        ("It is 17.", 1.0),
        ("- 17", 1.0),
        ("-17", 1.0),  # digits alone: the published rule
        ("1-17", 0.0),
        ("17.5", 0.0),
        ("7", 0.0),
        ("x", 0.0),
    ],
)
def test_first_number(prediction, score):
    assert scoring.first_number(prediction, ("17",)) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (" -4", 1.0),
        ("it returns -4.", 1.0),
        ("f(3) is `-4`", 1.0),
        ("-4 then 5", 0.0),
        ("minus four", 0.0),
        ("", 0.0),
        ("4", 0.0),
    ],
)
def test_last_integer(prediction, score):
    assert scoring.last_integer(prediction, ("-4",)) == score
