# SPDX-License-Identifier: Apache-2.0
"""top_tokens against sorting in Python."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from ops.top_tokens import top_tokens
from tests.ops.op_cases import jit


def by_sorting(scores, k, begin, end):
    scores = np.asarray(scores)
    indices = np.full((*scores.shape[:-1], k), scores.shape[-1])
    counts = np.zeros(scores.shape[:-1], int)
    for at in np.ndindex(counts.shape):
        slots = [j for j in range(scores.shape[-1]) if begin[at] <= j < end[at]]
        picked = sorted(sorted(slots, key=lambda j: (-scores[at][j], j))[:k])
        counts[at] = len(picked)
        indices[at][: len(picked)] = picked
    return indices, counts


@cache
def compiled(implementation, k):
    return jit(
        lambda scores, begin, end: top_tokens(
            scores, k, begin=begin, end=end, implementation=implementation
        )
    )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_against_sorting(implementation, k):
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.integers(-3, 3, (2, 3, 17)), jnp.float32)  # many ties
    begin, end = rng.integers(-2, 9, (2, 3)), rng.integers(4, 21, (2, 3))
    actual = compiled(implementation, k)(scores, begin, end)
    for got, want in zip(actual, by_sorting(scores, k, begin, end), strict=True):
        np.testing.assert_array_equal(got, want)
