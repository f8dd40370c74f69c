# SPDX-License-Identifier: Apache-2.0
"""Agreement, distances and intervals against their definitions."""

import functools

import numpy as np
import pytest

from lm.long_context import quality


def levenshtein(a, b):
    @functools.cache
    def of(i, j):
        if not i or not j:
            return i + j
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return of(len(a), len(b))


def test_edit_distance_is_levenshteins():
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = (rng.integers(0, 4, rng.integers(0, 12)) for _ in range(2))
        longest = max(len(a), len(b))
        wanted = levenshtein(tuple(a), tuple(b)) / longest if longest else 0.0
        assert quality.edit_distance(a, b) == pytest.approx(wanted)


def test_agreement_ends_where_texts_part():
    one = np.array([1, 2, 3, 4])
    assert quality.agreement(one, one) == 1
    assert quality.agreement(one, np.array([1, 2, 9, 4])) == 0.5
    assert quality.agreement(one, one[:2]) == 0.5
    assert quality.agreement(one[:0], one) == 0
    assert quality.agreement(one[:0], one[:0]) == 1


def test_intervals_cover_at_their_rate():
    """Of the mean difference of paired samples whose truth is known."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        hard = rng.random(60)  # shared by both methods
        first, last = (rng.random((2, 60)) < np.stack([hard * 0.9 + 0.1, hard])).astype(float)
        low, high = quality.difference(first, last, seed=trial).ci95
        covered += low <= 0.05 <= high  # 0.1 * (1 - mean of hard)
    assert 85 <= covered <= 100
    low, high = quality.interval([1.0] * 50)
    assert (low, high) == (pytest.approx(0.929, abs=1e-3), 1.0)


def test_a_method_against_another():
    rng = np.random.default_rng(0)
    good, bad = np.ones(40), (rng.random(40) < 0.5).astype(float)
    found = quality.against({"a": (good, bad), "b": (bad, bad)})
    assert found["holds"]
    assert found["above"]
    assert found["mean_difference"] == pytest.approx((1 - bad.mean()) / 2)
    assert found["ci95"][0] > 0
    assert found["differences"]["b"] == [0, 0, 0]
    found = quality.against({"a": (good, bad), "b": (bad, good), "c": (good, bad)})
    assert found["below"] == ["b"]
    assert found["above"]
    assert not found["holds"]


def test_the_least_share_counts_where_the_other_is_good():
    cells = {"a": ([1, 0.5], [1, 1]), "b": ([0, 0], [0.5, 0.5])}
    assert quality.least_share(cells, 0.8) == 0.75
    assert quality.least_share({"b": cells["b"]}, 0.8) is None
