# SPDX-License-Identifier: Apache-2.0
"""Items from processes beside this one."""

import functools
import os
from collections.abc import Sequence

import pytest

from lm.data import processes
from lm.errors import RunError


class Squares(Sequence):
    def __init__(self, count):
        if count < 1:
            raise ValueError("no squares")
        self.count = count

    def __len__(self):
        return self.count

    def __repr__(self):
        return f"Squares({self.count})"

    def __getitem__(self, index):
        if index == 77:
            raise ValueError("77 has none")
        if index == 90:
            os._exit(1)
        return index**2


def test_items_are_those_of_one_process():
    """In order, far ahead and back again; the last block is short."""
    plain = Squares(85)
    beside = processes.Beside(functools.partial(Squares, 85), 2)
    assert (len(beside), repr(beside)) == (85, "Squares(85)")
    order = [*range(64), 3, 81, 84, 0, 84]
    assert [beside[i] for i in order] == [i**2 for i in order if plain[i] == i**2]
    with pytest.raises(ValueError, match="77 has none"):
        beside[76]


def test_a_process_that_dies_is_told():
    beside = processes.Beside(functools.partial(Squares, 100), 1)
    with pytest.raises(RunError, match="died"):
        beside[80]
    with pytest.raises(RunError, match="died"):
        beside[0]


def test_refusals_come_at_once():
    with pytest.raises(ValueError, match="no squares"):
        processes.Beside(functools.partial(Squares, 0), 2)
