# SPDX-License-Identifier: Apache-2.0
"""How well something answers, with intervals: shares, agreement with other outputs, and paired
differences between two methods that answered the same samples."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm import plots

_RESAMPLES = 4000


def agreement(tokens: np.ndarray, reference: np.ndarray) -> float:
    """Share of the longer text before the two part: what comes after the first other token says
    nothing about the method. 1 when they are the same."""
    longest = max(len(tokens), len(reference))
    if not longest:
        return 1.0
    same = min(len(tokens), len(reference))
    differ = np.flatnonzero(np.asarray(tokens[:same]) != np.asarray(reference[:same]))
    return float((differ[0] if len(differ) else same) / longest)


def edit_distance(tokens: np.ndarray, reference: np.ndarray) -> float:
    """Levenshtein distance in tokens, over the longer text's length: 0 the same, 1 nothing."""
    tokens, reference = np.asarray(tokens), np.asarray(reference)
    longest = max(len(tokens), len(reference))
    if not longest:
        return 0.0
    places = np.arange(len(reference) + 1)
    row = places.copy()
    for number, token in enumerate(tokens, 1):
        kept = np.minimum(row[:-1] + (reference != token), row[1:] + 1)
        # insertions: the smallest of what is left of a place, one more for each step
        row = np.minimum.accumulate(np.concatenate([[number], kept]) - places) + places
    return float(row[-1] / longest)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of values in [0, 1].

    Wilson's, as if they were 0 or 1: no distribution on [0, 1] with that mean varies more.
    """
    return plots.interval(float(np.mean(values)), len(values))


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean of differences, with the interval that resampling the samples gives it."""

    mean: float
    ci95: tuple[float, float]


def difference(first: Sequence[float], last: Sequence[float], seed: int = 0) -> Difference:
    """First minus last on the same samples: paired, so that hard samples cancel."""
    return mean_difference([(first, last)], seed)


def mean_difference(
    cells: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0
) -> Difference:
    """The mean over cells of their mean difference; every cell's samples are resampled by
    themselves."""
    rng = np.random.default_rng(seed)
    means, drawn = [], []
    for first, last in cells:
        apart = np.subtract(first, last, dtype=np.float64)
        chosen = rng.integers(len(apart), size=(_RESAMPLES, len(apart)))
        means.append(apart.mean())
        drawn.append(apart[chosen].mean(axis=1))
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return Difference(float(np.mean(means)), (float(low), float(high)))


def against(
    cells: Mapping[str, tuple[Sequence[float], Sequence[float]]], seed: int = 0
) -> dict[str, Any]:
    """One method against another over named cells (such as a task at a length).

    Returns:
      `mean_difference` and its `ci95`; `below`, the cells where the first is below by more than the
      95 % interval of their difference; `differences` of all cells; and `holds`: none is below, and
      the mean is not negative. `above`: the mean is positive.
    """
    found = {name: difference(*pair, seed) for name, pair in cells.items()}
    mean = mean_difference(list(cells.values()), seed)
    below = [name for name, apart in found.items() if apart.ci95[1] < 0]
    return {
        "cells": len(cells),
        "mean_difference": mean.mean,
        "ci95": list(mean.ci95),
        "below": below,
        "above": mean.mean > 0,
        "holds": not below and mean.mean >= 0,
        "differences": {name: [apart.mean, *apart.ci95] for name, apart in found.items()},
    }


def least_share(
    cells: Mapping[str, tuple[Sequence[float], Sequence[float]]], of_at_least: float
) -> float | None:
    """The smallest ratio of means, first over last, among cells where the last reaches
    `of_at_least`; None where none does."""
    shares = [
        float(np.mean(first) / np.mean(last))
        for first, last in cells.values()
        if np.mean(last) >= of_at_least
    ]
    return min(shares) if shares else None
