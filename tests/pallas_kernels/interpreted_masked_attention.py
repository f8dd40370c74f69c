# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of masked_attention against the reference, interpreted on a CPU.

Run by test_masked_attention_triton in a process of its own: Triton decides at import whether it
interprets.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import _masked_attention_triton, dispatch
from ops.masked_attention import masked_attention
from ops.visibility import Visibility
from pallas_kernels import block_lists_triton, triton_call
from pallas_kernels import masked_attention_triton_config as configs
from tests.ops.op_cases import MASKS, dense, visibility
from tests.ops.op_tolerances import assert_close
from tests.ops.test_masked_attention import problem, value_and_gradients
from tests.pallas_kernels import triton_interpreter

# different ones for each pass, so that none can use another's lists
_BLOCKS = {
    "forward": configs.Config(16, 32, 4, 1),
    "dq": configs.Config(32, 16, 4, 1),
    "dkdv": configs.Config(32, 16, 4, 1),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    triton_interpreter.interpret(monkeypatch)
    context = dispatch.target_platform("gpu"), triton_call.target_capability(90)
    with context[0], context[1], configs.override(**_BLOCKS):
        yield


def compare(arguments):
    expected = value_and_gradients("reference", None, *arguments)
    actual = value_and_gradients("triton", None, *arguments)
    assert_close(actual, expected, arguments[0].dtype)


def test_masks():
    """A sequence under each mask, in one batch."""
    masks = [visibility(name, 1, 53) for name in MASKS]
    mask = jax.tree.map(lambda *x: jnp.concatenate(x), *masks)
    compare(problem(mask, len(MASKS), 53, 53, 2, 1, 64))


@pytest.mark.parametrize(("N", "K", "H"), [(2, 2, 128), (4, 1, 64), (8, 1, 64), (1, 1, 256)])
def test_grouped_heads_and_head_dims(N, K, H):
    compare(problem("tree", 1, 20, 37, N, K, H))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    compare(problem("random", 1, 37, 37, 2, 1, 64, dtype))


def test_without_hidden_runs_and_offsets():
    mask = Visibility.documents([[40, 9], [0, 53]], 53)
    compare(problem(mask, 2, 53, 53, 2, 1, 64))


@pytest.mark.parametrize(("num_rows", "offset"), [(18, [30, 3]), (50, [0, -7]), (1, [36, 0])])
def test_rows_and_keys_of_different_lengths(num_rows, offset):
    q, k, v, mask = problem("hidden", 2, num_rows, 37, 1, 1, 64)
    compare((q, k, v, dataclasses.replace(mask, row_offset=jnp.array(offset, jnp.int32))))


def test_rows_that_see_nothing():
    q, k, v, mask = problem("blind", 2, 53, 53, 2, 1, 64)
    (out, lse), (dq, dk, dv) = value_and_gradients("triton", None, q, k, v, mask)
    blind = ~dense(mask, 53).any(-1)
    for values in (out, dq):
        np.testing.assert_array_equal(np.asarray(values)[blind], 0)
    np.testing.assert_array_equal(np.asarray(lse)[blind], -np.inf)
    np.testing.assert_array_equal([dk[1], dv[1]], 0)


def test_blocks_that_nobody_needs_are_not_computed():
    q, k, v, mask = problem(Visibility.documents([[32, 32]], 64), 1, 64, 64, 2, 1, 64)
    for poisoned, clean in ((slice(0, 32), slice(32, 64)), (slice(32, 64), slice(0, 32))):
        bad = [x.at[:, poisoned].set(jnp.nan) for x in (q, k, v)]
        (out, _), gradients = value_and_gradients("triton", None, *bad, mask)
        for values in (out, *gradients):
            assert np.isfinite(values[:, clean]).all()
            assert np.isnan(values[:, poisoned]).any()


def test_fully_visible_blocks_are_not_masked(monkeypatch):
    """Lists that call every block full give attention without a mask."""
    lists = _masked_attention_triton._lists
    monkeypatch.setattr(
        _masked_attention_triton, "_lists", lambda table: lists(jnp.full_like(table, 2))
    )
    q, k, v, mask = problem("causal", 1, 64, 64, 2, 1, 64)
    out = jax.jit(lambda *x: masked_attention(*x, mask, implementation="triton"))(q, k, v)
    expected = jax.nn.dot_product_attention(q, k, v)
    assert_close(out, expected, "float32")


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale):
    q, k, v, mask = problem("tree", 1, 37, 37, 2, 2, 64)

    def gradients(implementation):
        def loss(*x):
            out = masked_attention(*x, mask, scale=scale, implementation=implementation)
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    assert_close(gradients("triton"), gradients("reference"), "float32")


def test_large_scores_do_not_overflow():
    q, k, v, mask = problem("causal", 2, 53, 53, 2, 1, 64)
    outputs, gradients = value_and_gradients("triton", None, 30 * q, 30 * k, v, mask)
    assert all(np.isfinite(x).all() for x in (*outputs, *gradients))
    expected = value_and_gradients("reference", None, 30 * q, 30 * k, v, mask)
    assert_close(outputs[1], expected[0][1], "float32")


@pytest.mark.parametrize("length", [1, 70, 2500])
def test_compacted_lists(length):
    """Also lists that take several chunks."""
    ranks = np.random.default_rng(length).integers(0, 3, (2, 3, length))
    ranked = jnp.asarray(ranks << block_lists_triton.RANK_SHIFT | np.arange(length), jnp.int32)
    counts, entries = block_lists_triton.lists(ranked, length, 2, 90)
    for index in np.ndindex(2, 3):
        full, other = (np.flatnonzero(ranks[index] == rank) for rank in (0, 1))
        needed = len(full) + len(other)
        assert counts[index].tolist() == [len(full), needed]
        expected = [*full, *other, length, length]
        assert entries[index][: needed + 2].tolist() == expected
