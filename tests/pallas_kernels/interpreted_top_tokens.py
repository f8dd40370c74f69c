# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of top_tokens against sorting, interpreted on a CPU.

Run by test_selection_triton in a process of its own: Triton decides at import whether it
interprets.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.top_tokens import top_tokens
from pallas_kernels import selection_triton_config as configs
from pallas_kernels import triton_call
from tests.ops.test_top_tokens import by_sorting
from tests.pallas_kernels import triton_interpreter

_PIECES = {"one_program": configs.Config(16, 4), "count": configs.Config(64, 4)}


@pytest.fixture(autouse=True, params=["pieces", "one_program"])
def interpreted(request, monkeypatch):
    triton_interpreter.interpret(monkeypatch)
    context = dispatch.target_platform("gpu"), triton_call.target_capability(90)
    chosen = _PIECES if request.param == "pieces" else {}
    with context[0], context[1], configs.override(**chosen):
        yield


def compare(scores, k, begin, end):
    scores = jnp.asarray(scores, jnp.float32)
    bounds = {"begin": jnp.asarray(begin, jnp.int32), "end": jnp.asarray(end, jnp.int32)}
    actual = top_tokens(scores, k, **bounds, implementation="triton")
    for got, want in zip(actual, by_sorting(scores, k, begin, end), strict=True):
        np.testing.assert_array_equal(got, want)


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rows_with_ranges_of_their_own():
    """Empty, of one slot, shorter than k, whole pieces, everything; two leading dimensions."""
    begin = [[0, 5, 64, 100], [0, 199, 7, 130]]
    end = [[200, 5, 128, 20], [64, 200, 12, 170]]
    compare(random((2, 4, 200)), 9, begin, end)


@pytest.mark.parametrize("k", [1, 64, 200, 300])
def test_numbers_of_slots(k):
    compare(random((1, 200), k), k, [0], [200])


def test_scores_far_apart_and_close_together():
    """Every digit decides somewhere: signs, exponents, and last bits."""
    wide = random(150) * 10.0 ** random(150, 1) ** 3
    close = 1 + np.random.default_rng(2).permutation(150) * np.float32(2**-23)
    special = np.resize([np.inf, -np.inf, 0.0, -0.0, 1e-37, -1e-37, 3e38, -3e38], 150)
    for k in (3, 40, 140):
        compare(np.stack([wide, close, special]), k, [0, 1, 2], [150, 149, 150])


@pytest.mark.parametrize("values", [1, 3])
def test_ties_go_to_the_lower_slot(values):
    scores = np.random.default_rng(values).integers(0, values, (2, 190)) - 1.0
    for k in (1, 120):
        compare(scores, k, [3, 70], [190, 188])


def test_votes_of_a_softmax():
    """Most of them tiny, or nothing at all."""
    votes = np.exp(np.minimum(40 * random((1, 300)), 80))
    compare(votes / votes.sum(), 50, [10], [290])


def test_what_lies_outside_the_range_has_no_influence():
    scores = random((1, 200))
    scores[:, :20] = np.nan
    scores[:, 150:] = np.inf
    compare(scores, 17, [20], [150])
