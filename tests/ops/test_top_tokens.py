# SPDX-License-Identifier: Apache-2.0
"""top_tokens against sorting in Python."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ops import dispatch
from ops.top_tokens import top_tokens
from tests.ops.op_cases import cpu_mesh, jit

# "xla" searches on CPU and sorts elsewhere: both ways are run here.
WAYS = [("reference", "cpu"), ("xla", "cpu"), ("xla", "tpu")]
every_way = pytest.mark.parametrize(("implementation", "platform"), WAYS)


def by_sorting(scores, k, begin, end):
    scores, begin, end = np.asarray(scores, np.float32), np.asarray(begin), np.asarray(end)
    indices = np.full((*scores.shape[:-1], k), scores.shape[-1])
    counts = np.zeros(scores.shape[:-1], int)
    for at in np.ndindex(counts.shape):
        row = scores[at].tolist()
        slots = [j for j in range(len(row)) if begin[at] <= j < end[at]]
        picked = sorted(sorted(slots, key=lambda j: (-row[j], j))[:k])
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


def check(implementation, platform, scores, k, begin, end):
    with dispatch.target_platform(platform):
        actual = compiled(implementation, k)(scores, begin, end)
    for got, want in zip(actual, by_sorting(scores, k, begin, end), strict=True):
        assert got.dtype == "int32"
        np.testing.assert_array_equal(got, want)


@every_way
@pytest.mark.parametrize("k", [1, 7, 60, 100])
def test_against_sorting(implementation, platform, k):
    """Distinct scores, many ties, nothing but ties, zeros of both signs, infinities; ranges that
    are empty, turned round, whole, and beyond the array; NaN outside of them."""
    rng = np.random.default_rng(0)
    scores = np.stack(
        [
            rng.standard_normal((6, 83)),
            rng.integers(-3, 3, (6, 83)),
            np.full((6, 83), -1.5),
            np.where(rng.random((6, 83)) < 0.5, 0.0, -0.0),
            rng.choice([-np.inf, -1e38, 1e-45, 0.0, np.inf], (6, 83)),
        ]
    ).astype(np.float32)
    begin = np.broadcast_to([0, 3, 40, 50, -7, 0], scores.shape[:2])
    end = np.broadcast_to([83, 80, 45, 20, 200, 0], scores.shape[:2])
    slots = np.arange(83)
    outside = (slots < begin[..., None]) | (slots >= end[..., None])
    check(implementation, platform, np.where(outside, np.nan, scores), k, begin, end)


@every_way
def test_many_scores_of_one_sequence(implementation, platform):
    """No leading dimension; bfloat16 makes ties."""
    scores = jnp.asarray(np.random.default_rng(1).standard_normal(20_001), jnp.bfloat16)
    check(implementation, platform, scores, 300, jnp.int32(10), jnp.int32(20_000))


def test_rows_on_several_devices():
    scores = jnp.asarray(np.random.default_rng(2).standard_normal((4, 50)), jnp.float32)
    begin, end = jnp.zeros(4, jnp.int32), jnp.array([50, 3, 20, 0], jnp.int32)
    local = lambda s, b, e: top_tokens(s, 5, begin=b, end=e, implementation="xla")  # noqa: E731
    rows = P("data")
    split = jax.shard_map(local, mesh=cpu_mesh(data=2), in_specs=(rows,) * 3, out_specs=rows)
    actual = jit(split)(scores, begin, end)
    for got, want in zip(actual, by_sorting(scores, 5, begin, end), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": jnp.zeros((2, 0))}, "no dimension 0"),
        ({"scores": jnp.zeros((2, 5), jnp.int32)}, "floating point of at most 32 bits"),
        ({"k": 0}, "k must be at least 1"),
        ({"begin": jnp.zeros(3, jnp.int32)}, r"begin must be \(2,\) integers"),
        ({"end": jnp.zeros(2)}, r"end must be \(2,\) integers"),
    ],
)
def test_nonsense_is_refused(change, message):
    bounds = {"begin": jnp.zeros(2, jnp.int32), "end": jnp.ones(2, jnp.int32)}
    with pytest.raises(ValueError, match=message):
        top_tokens(**{"scores": jnp.zeros((2, 5)), "k": 3, **bounds, **change})
