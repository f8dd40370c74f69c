# SPDX-License-Identifier: Apache-2.0
"""masked_attention: the reference against loops, every implementation against the reference."""

import dataclasses
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from ops import _masked_attention_xla, dispatch
from ops.masked_attention import masked_attention
from ops.visibility import Visibility
from tests.ops.op_cases import DRAW_ONLY, MASKS, arrays, attention_by_loops, dense, jit, visibility
from tests.ops.op_tolerances import assert_close

IMPLEMENTATIONS = ("xla",)  # those compared with the reference


def small_blocks(monkeypatch, q, k):
    """Many blocks on small arrays."""
    sizes = _masked_attention_xla.BlockSizes(q, k)
    monkeypatch.setattr(_masked_attention_xla, "block_sizes", lambda *shape: sizes)


def problem(mask, B, T, S, N, K, H, dtype="float32", seed=0):
    q, k, v = arrays(seed, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype=dtype)
    return q, k, v, visibility(mask, B, S, seed) if isinstance(mask, str) else mask


@partial(jit, static_argnums=(0, 1))
def value_and_gradients(implementation, blocks, q, k, v, mask):
    """Outputs, and gradients of a loss that uses every output and log-sum-exp; `blocks` separates
    jit's entries."""
    del blocks

    def loss(q, k, v):
        out, lse = masked_attention(q, k, v, mask, return_lse=True, implementation=implementation)
        sees = lse > -jnp.inf
        probe = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        total = jnp.sum(out.astype(jnp.float32) * probe)
        return total + jnp.sum(jnp.where(sees, jnp.sin(lse), 0.0)), (out, lse)

    (_, outputs), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return outputs, gradients


def compare(arguments, blocks=None):
    dtype = arguments[0].dtype
    expected = value_and_gradients("reference", None, *arguments)
    for implementation in IMPLEMENTATIONS:
        actual = value_and_gradients(implementation, blocks, *arguments)
        assert actual[0][0].dtype == dtype
        assert [g.dtype for g in actual[1]] == [dtype] * 3
        assert_close(actual, expected, dtype)


@pytest.mark.parametrize("mask", MASKS)
def test_reference_is_the_definition(mask):
    q, k, v, mask = problem(mask, 2, 6, 9, 4, 2, 3)
    mask = dataclasses.replace(mask, row_offset=jnp.array([3, 1]))
    out, lse = jit(
        lambda *a: masked_attention(*a, scale=0.7, return_lse=True, implementation="reference")
    )(q, k, v, mask)
    expected = attention_by_loops(q, k, v, dense(mask, 6), 0.7)
    assert_close((out, lse), expected, "float32")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("blocks", [(16, 8), (64, 64)])
def test_masks_against_the_reference(mask, blocks, monkeypatch):
    """Ragged length (37) in many blocks, and in one block that is longer than it."""
    small_blocks(monkeypatch, *blocks)
    compare(problem(mask, 2, 37, 37, 4, 2, 8), blocks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mask", ["tree", "random"])
def test_half_precision_against_the_reference(mask, dtype, monkeypatch):
    small_blocks(monkeypatch, 16, 16)
    compare(problem(mask, 2, 40, 40, 4, 2, 16, dtype), (16, 16))


@pytest.mark.parametrize(("N", "K", "H"), [(2, 2, 64), (4, 2, 128), (4, 1, 256), (8, 1, 40)])
def test_grouped_heads_and_head_dims(N, K, H, monkeypatch):
    small_blocks(monkeypatch, 8, 16)
    compare(problem("documents", 1, 24, 24, N, K, H), (8, 16))


def test_masks_without_hidden_runs_and_offsets(monkeypatch):
    small_blocks(monkeypatch, 16, 8)
    compare(problem(Visibility.documents([[20, 9], [0, 33]], 37), 2, 37, 37, 4, 2, 8), (16, 8))


@pytest.mark.parametrize(("num_rows", "offset"), [(10, [20, 3]), (50, [0, -7]), (1, [29, 0])])
def test_rows_and_keys_of_different_lengths(num_rows, offset, monkeypatch):
    small_blocks(monkeypatch, 8, 8)
    q, k, v, mask = problem("hidden", 2, num_rows, 30, 4, 2, 8)
    offset = jnp.array(offset, jnp.int32)
    mask = dataclasses.replace(mask, row_offset=offset)
    compare((q, k, v, mask), (8, 8))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_rows_that_see_nothing(implementation):
    q, k, v, mask = problem("blind", 2, 37, 37, 4, 2, 8)
    (out, lse), (dq, dk, dv) = value_and_gradients(implementation, None, q, k, v, mask)
    blind = ~dense(mask, 37).any(-1)
    assert blind.sum() == 19 + 37
    for values in (out, dq):
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(np.asarray(values)[blind], 0)
    np.testing.assert_array_equal(np.asarray(lse)[blind], -np.inf)
    np.testing.assert_array_equal([dk[1], dv[1]], 0)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("mask", ["tree", "random"])
def test_gradients_reach_exactly_the_visible_keys(implementation, mask, monkeypatch):
    """d out[i] / d v[j] is non-zero where row i sees key j, and nowhere else."""
    small_blocks(monkeypatch, 4, 4)
    q, k, v, mask = problem(mask, 1, 10, 10, 1, 1, 2)

    def row_sums(v):
        return masked_attention(q, k, v, mask, implementation=implementation).sum((0, 2, 3))

    reached = np.abs(jit(jax.jacrev(row_sums))(v)).sum((1, 3, 4)) > 0
    np.testing.assert_array_equal(reached, dense(mask, 10)[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_that_nobody_needs_are_not_computed(implementation, monkeypatch):
    """Rows of the second document come out finite although the first one's keys are NaN, and the
    reverse."""
    small_blocks(monkeypatch, 8, 8)
    q, k, v, mask = problem(Visibility.documents([[8, 8]], 16), 1, 16, 16, 2, 1, 4)
    for poisoned, clean in ((slice(0, 8), slice(8, 16)), (slice(8, 16), slice(0, 8))):
        bad = [x.at[:, poisoned].set(jnp.nan) for x in (q, k, v)]
        (out, _), gradients = value_and_gradients(implementation, "poison", *bad, mask)
        for values in (out, *gradients):
            assert np.isfinite(values[:, clean]).all()
            assert np.isnan(values[:, poisoned]).any()


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_large_scores_do_not_overflow(implementation):
    """exp of these scores is beyond float32."""
    q, k, v, mask = problem("causal", 2, 37, 37, 4, 2, 8)
    outputs, gradients = value_and_gradients(implementation, "large", 30 * q, 30 * k, v, mask)
    assert np.abs(outputs[1]).max() > 1000
    assert all(np.isfinite(x).all() for x in (*outputs, *gradients))
    expected = attention_by_loops(30 * q, 30 * k, v, dense(mask, 37), 8**-0.5)
    assert_close(outputs[1], expected[1], "float32")


@hypothesis.settings(max_examples=3, deadline=None, phases=DRAW_ONLY)
@hypothesis.given(st.data())
def test_drawn_shapes(data):
    T, S = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    K, group, H = (data.draw(st.integers(1, n)) for n in (2, 3, 9))
    blocks = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))
    arguments = problem(
        data.draw(st.sampled_from(MASKS)) if S > 4 else "causal", 2, T, S, K * group, K, H
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_blocks(monkeypatch, *blocks)
        compare(arguments, blocks)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_block_sizes_suit_the_platform(platform):
    """Short arrays are one block; otherwise little padding, and scores within the budget."""
    sizes = _masked_attention_xla.block_sizes
    budget = _masked_attention_xla._SCORE_BYTES[platform]
    with dispatch.target_platform(platform):
        assert sizes(4, 200, 100) == _masked_attention_xla.BlockSizes(200, 100)
        for heads, length in ((4, 1000), (64, 32768), (4096, 32768)):
            chosen = sizes(heads, length, length)
            assert -length % chosen.q < 16 * (length // chosen.q + 1)
            assert chosen.q * chosen.k * heads * 4 <= max(budget, 4 * heads * 128**2)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 2, 8), (2, 4, 2, 8), (2, 5, 2, 8)), "do not fit together"),
        (((2, 4, 2, 8), (2, 4, 2, 6), (2, 4, 2, 6)), "do not fit together"),
        (((2, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)), "do not fit together"),
        (((2, 4, 3, 8), (2, 4, 2, 8), (2, 4, 2, 8)), "multiple of key and value heads"),
        (((2, 0, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)), "at least 1"),
        (((4, 2, 8), (4, 2, 8), (4, 2, 8)), "four dimensions"),
        (((2, 4, 2, 8), (2, 5, 2, 8), (2, 5, 2, 8)), r"visibility is over \(2, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    q, k, v = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        masked_attention(q, k, v, Visibility.causal(2, 4))


def test_integers_and_halves_of_masks_are_refused():
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match="floating point"):
        masked_attention(x.astype(jnp.int32), x, x, Visibility.causal(1, 4))
    with pytest.raises(ValueError, match="together or not at all"):
        masked_attention(
            x, x, x, Visibility(jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32))
        )
