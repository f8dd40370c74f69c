# SPDX-License-Identifier: Apache-2.0
"""cached_attention: the reference against loops, every implementation against the reference."""

import functools
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from ops import (
    _cached_attention_masked,
    _cached_attention_xla,
    _masked_attention_xla,
    dispatch,
)
from ops.cached_attention import cached_attention
from tests.ops.op_cases import arrays, attention_by_loops, jit
from tests.ops.op_tolerances import assert_close

IMPLEMENTATIONS = ("xla",)  # those compared with the reference


def small_blocks(monkeypatch, block):
    monkeypatch.setattr(_cached_attention_xla, "block_size", lambda rows, slots: min(block, slots))


def run(implementation, block, q, k, v, lengths, scale=None):
    return compiled(implementation, block, scale)(q, k, v, lengths)


@cache
def compiled(implementation, block, scale):
    """`block` only separates the entries."""
    settings = {"implementation": implementation, "scale": scale, "return_lse": True}
    return jit(lambda q, k, v, n: cached_attention(q, k, v, lengths=n, **settings))


def problem(B, T, S, N, K, H, dtype="float32"):
    return arrays(0, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype=dtype)


@pytest.mark.parametrize("T", [1, 4])
def test_reference_is_the_definition(T):
    q, k, v = problem(3, T, 9, 4, 2, 3)
    lengths = np.array([9, 5, 2])  # with T = 4 the last sequence has rows before its start
    mask = np.zeros((3, T, 9), bool)
    for b, t, j in np.ndindex(mask.shape):
        mask[b, t, j] = j <= lengths[b] - T + t
    expected = attention_by_loops(q, k, v, mask, 0.3)
    assert_close(run("reference", None, q, k, v, jnp.asarray(lengths), 0.3), expected, "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("T", "N", "K", "H", "block"),
    [(1, 2, 2, 64, 8), (1, 8, 1, 9, 8), (5, 4, 2, 16, 8), (5, 4, 2, 16, 64), (1, 4, 2, 16, 64)],
)
def test_against_the_reference(implementation, T, N, K, H, block, monkeypatch):
    """S = 21 is no multiple of the block; a sequence is empty, one shorter than T, one full."""
    small_blocks(monkeypatch, block)
    arguments = (*problem(4, T, 21, N, K, H), jnp.array([21, 13, 3, 0], jnp.int32))
    actual = run(implementation, block, *arguments)
    assert_close(actual, run("reference", None, *arguments), "float32")


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(implementation, dtype, monkeypatch):
    """Against loops in float64 over the same rounded inputs; also a float32 query over a half
    cache."""
    small_blocks(monkeypatch, 8)
    q, k, v = problem(2, 2, 21, 4, 2, 16, dtype)
    lengths = np.array([21, 10])
    mask = np.arange(21)[None, None] <= (lengths[:, None] - 2 + np.arange(2)[None])[:, :, None]
    expected = attention_by_loops(*(x.astype(jnp.float32) for x in (q, k, v)), mask, 0.25)
    out, lse = run(implementation, 8, q, k, v, jnp.asarray(lengths))
    assert (out.dtype, lse.dtype) == (dtype, "float32")
    assert_close((out, lse), expected, dtype)
    out, lse = run(implementation, 8, q.astype(jnp.float32), k, v, jnp.asarray(lengths))
    assert out.dtype == "float32"
    assert_close((out, lse), expected, "float32")


def test_chunks_are_rows_of_masked_attention():
    """What GPUs run, with XLA's attention in place of their kernels: the second sequence is shorter
    than the chunk, the last one is empty. Single steps are left to others."""
    q, k, v = problem(3, 64, 100, 4, 2, 16)
    lengths = jnp.array([100, 40, 0], jnp.int32)
    chunk = functools.partial(
        _cached_attention_masked.served, "xla", _masked_attention_xla.masked_attention
    )
    stacked = q, k[None], v[None], lengths, jnp.int32(0)
    actual = jit(lambda *x: chunk(*x, scale=0.25))(*stacked)
    assert_close(actual, run("reference", None, q, k, v, lengths), "float32")
    with pytest.raises(dispatch.Unsupported, match="64 new tokens and more, not 63"):
        chunk(q[:, 1:], *stacked[1:], scale=0.25)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_chunks_on_a_gpu(implementation):
    arguments = (*problem(3, 512, 3000, 8, 2, 128, "bfloat16"), jnp.array([3000, 1300, 512]))
    actual = run(implementation, None, *arguments)
    assert_close(actual, run("reference", None, *arguments), "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("T", [1, 9])
def test_new_tokens_on_a_gpu(T, dtype):
    arguments = (*problem(3, T, 33_000, 32, 8, 128, dtype), jnp.array([33_000, 1300, 5]))
    actual = run("triton", None, *arguments)
    assert_close(actual, run("xla", None, *arguments), dtype)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_free_slots_have_no_influence(implementation, monkeypatch):
    small_blocks(monkeypatch, 8)
    q, k, v = problem(2, 3, 21, 2, 1, 4)
    lengths = jnp.array([12, 6], jnp.int32)
    free = jnp.arange(21)[None, :, None, None] >= lengths[:, None, None, None]
    dirty = [jnp.where(free, 1e30, x) for x in (k, v)]
    clean = [jnp.where(free, 0.0, x) for x in (k, v)]
    expected = run("reference", 8, q, *clean, lengths)
    assert_close(run(implementation, 8, q, *dirty, lengths), expected, "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_filled_part_of_the_cache_is_read(implementation):
    """A batch without filled slots runs no block at all: keys of NaN everywhere leave no trace."""
    q, k, v = problem(1, 1, 9000, 1, 1, 4)
    assert _cached_attention_xla.block_size(1, 9000) < 9000
    out, lse = run(implementation, None, q, k.at[:].set(jnp.nan), v, jnp.array([0]))
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_block_sizes_stay_within_their_budget(platform):
    size = _cached_attention_xla.block_size
    with dispatch.target_platform(platform):
        assert size(32, 100) == 100
        assert 1024 <= size(32, 32768) <= 8192
        assert size(512 * 32, 32768) * 512 * 32 * 4 <= 32 << 20
        assert size(10**6, 32768) == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": jnp.zeros(3, jnp.int32)}, r"lengths must be \(2,\) integers"),
        ({"lengths": jnp.zeros(2)}, r"lengths must be \(2,\) integers"),
        ({"q": jnp.zeros((2, 6, 2, 8))}, "6 new tokens do not fit a cache of 5 slots"),
        ({"v": jnp.zeros((2, 5, 1, 8))}, "do not fit together"),
        ({"q": jnp.zeros((2, 1, 3, 8))}, "multiple of key and value heads"),
        ({"k": jnp.zeros((2, 5, 2, 8), jnp.int8)}, "k must be floating point"),
    ],
)
def test_nonsense_is_refused(change, message):
    cache = jnp.zeros((2, 5, 2, 8))
    arguments = {"q": jnp.zeros((2, 1, 2, 8)), "k": cache, "v": cache}
    with pytest.raises(ValueError, match=message):
        cached_attention(**{**arguments, "lengths": jnp.ones(2, jnp.int32), **change})
