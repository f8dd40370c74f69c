# SPDX-License-Identifier: Apache-2.0
"""Gates: what holds, what fails, what is refused."""

import math

import pytest

from experiments import gate
from lm.errors import UserError

NAMES = ("exact_match", "loss")


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("exact_match>=0.9", True),
        ("exact_match >= 0.91", False),
        ("exact_match>0.9", False),
        ("exact_match==0.9", True),
        ("exact_match<=.9", True),
        ("exact_match<9e-1", False),
        ("loss<2,exact_match>0.5", True),
        ("loss<1,exact_match>0.5", False),
    ],
)
def test_requirements(text, holds):
    failed = gate.failures(gate.parse([text], NAMES), {"exact_match": 0.9, "loss": 1.5})
    assert (not failed) == holds


def test_several_flags_and_the_message():
    requirements = gate.parse(["exact_match>=0.95", "loss<=1"], NAMES)
    failed = gate.failures(requirements, {"exact_match": 0.5, "loss": 0.25})
    assert failed == ["exact_match=0.5, required exact_match>=0.95"]


@pytest.mark.parametrize("symbol", [">=", "<=", "==", ">", "<"])
def test_nan_never_holds(symbol):
    assert gate.failures(gate.parse([f"loss{symbol}1"], NAMES), {"loss": math.nan})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("exact_match", "expected a form like exact_match>=0.9"),
        ("", "expected a form"),
        ("exact_match=>1", "expected a form"),
        ("accuracy>=1", "accuracy is not one of exact_match, loss"),
        ("loss<=low", "'low' is not a number"),
    ],
)
def test_refused(text, reason):
    with pytest.raises(UserError, match=reason):
        gate.parse([text], NAMES)
