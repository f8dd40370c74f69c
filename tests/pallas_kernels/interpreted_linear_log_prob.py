# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of linear_log_prob against the reference, interpreted on a CPU.

Run by test_linear_log_prob_triton in a process of its own: Triton decides at import whether it
interprets.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.benchmarks import linear_log_prob_check as check
from ops import _linear_log_prob_triton as triton_passes
from ops import _linear_log_prob_xla as chunks
from ops import dispatch
from ops.linear_log_prob import linear_log_prob
from pallas_kernels import linear_log_prob_triton_config as configs
from pallas_kernels import triton_call
from tests.ops.op_cases import arrays, jit
from tests.ops.op_tolerances import assert_close
from tests.ops.test_linear_log_prob import problem, value_and_gradients
from tests.pallas_kernels import triton_interpreter

CONFIG = configs.Config(gradient_mib=1, logit_mib=1, block=1024, num_warps=4, num_stages=1)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Chunks of 16 rows, in two parts."""
    triton_interpreter.interpret(monkeypatch)
    monkeypatch.setattr(configs.Config, "rows", lambda *shape: (16, 8))
    context = dispatch.target_platform("gpu"), triton_call.target_capability(90)
    with context[0], context[1], configs.override(CONFIG):
        yield


def compare(arguments, softcap=None, valid_vocab=None):
    expected = value_and_gradients("reference", softcap, valid_vocab, None, *arguments)
    actual = value_and_gradients("triton", softcap, valid_vocab, None, *arguments)
    assert_close(actual, expected, arguments[0].dtype)
    return actual


def test_without_settings():
    compare(problem(29, 6, 31))


@pytest.mark.parametrize("valid_vocab", [2048, 1100])
def test_rows_of_several_blocks(valid_vocab):
    compare(problem(17, 4, 2500), 3.0, valid_vocab)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_within_what_rounding_allows(dtype):
    rows = list(check.sweep(("triton",), (dtype,), check.SMALL_CASES[:1]))
    assert len(rows) == 2
    assert all(row["passed"] for row in rows), rows


def test_logits_far_above_the_first_block():
    """Exponentials relative to the first block's largest logit would overflow: e^300."""
    x, w, targets, weights = problem(16, 4, 2500)
    w = w.at[2000].set(jnp.full(4, 100.0))
    x = jnp.abs(x) + 0.5
    results = compare((x, w, targets, weights))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


def test_logits_far_below_the_first_block():
    x, w, targets, weights = problem(16, 4, 2500)
    w, x = w.at[3].set(jnp.full(4, 100.0)), jnp.abs(x) + 0.5
    compare((x, w, targets, weights))


def test_confident_rows_keep_their_gradient():
    """1 - probability is about 1e-3: bfloat16 probabilities near 1 would be off by twice that."""
    targets = jnp.arange(16, dtype=jnp.int32)
    x = jnp.eye(16, dtype=jnp.bfloat16) * 9.5

    def loss(x, implementation):
        w = jnp.eye(16, dtype=x.dtype)
        return linear_log_prob(x, w, targets, jnp.ones(16), implementation=implementation)[0]

    gradient = jit(jax.grad(loss), static_argnums=1)
    expected = gradient(x.astype(jnp.float32), "reference")
    assert 1e-4 < float(expected[0, 0]) < 2e-3
    actual = gradient(x, "triton")
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, rtol=2**-6)


def test_padding_inside_a_chunk_is_not_read():
    """NaN in rows without a target reaches nothing."""
    x, w, targets, weights = problem(29, 6, 31)
    x = jnp.where((targets < 0)[:, None], jnp.nan, x)
    clean = jnp.where((targets < 0)[:, None], 0.0, x)
    expected = value_and_gradients("reference", None, None, None, clean, w, targets, weights)
    actual = value_and_gradients("triton", None, None, None, x, w, targets, weights)
    assert_close(actual[1], expected[1], "float32")


def test_impossible_targets():
    x, w, _, _ = problem(4, 3, 10)
    targets = jnp.array([9, 10, 2**31 - 1, 6], jnp.int32)

    def values(targets, valid_vocab):
        call = jit(linear_log_prob, static_argnums=(4, 5), static_argnames="implementation")
        return call(x, w, targets, None, None, valid_vocab, implementation="triton")

    np.testing.assert_array_equal(
        np.isneginf(values(targets, None)), np.array([False, True, True, False])
    )
    np.testing.assert_array_equal(np.isneginf(values(targets, 6)), True)
    gradients_of = jax.grad(
        lambda *a: linear_log_prob(*a[:2], targets, a[2], implementation="triton")[0], (0, 1, 2)
    )
    for weights in (jnp.ones(4), jnp.array([1.0, 0.0, 0.0, 1.0])):
        gradients = jit(gradients_of)(x, w, weights)
        assert not any(np.isnan(gradient).any() for gradient in gradients)


@pytest.mark.parametrize("first", [0, 20, 40])
def test_shards_of_the_vocabulary(first):
    """What one device computes of rows whose targets lie on any device; the last shard has no valid
    column at all."""
    x, w, targets, _ = problem(16, 6, 20)
    targets = jnp.where(targets < 0, targets, 3 * targets % 60)
    chunk = chunks.Chunk(x, w, targets, jnp.int32(first))
    expected_passes = chunks._XlaPasses(3.0, 33)
    passes = triton_passes._TritonPasses(8, "float32", 3.0, 33, CONFIG, 90)
    expected = jit(expected_passes.statistics)(chunk)
    kept = np.asarray(targets) >= 0
    actual = jit(passes.statistics)(chunk)
    assert_close([a[kept] for a in actual], [e[kept] for e in expected], "float32")
    cotangents = [jnp.where(kept, c, 0.0) for c in arrays(1, (16,), (16,))]
    got = jit(passes.gradients)(chunk, actual[0], *cotangents)
    wanted = jit(expected_passes.gradients)(chunk, expected[0], *cotangents)
    assert_close(got, wanted, "float32")


def test_a_frozen_argument_costs_no_product():
    x, w, targets, weights = problem(16, 6, 31)

    def general(x, w):
        return jnp.sum(linear_log_prob(x, w, targets, implementation="triton"))

    def weighted(x, w):
        return linear_log_prob(x, w, targets, weights, implementation="triton")[0]

    def products(function, *asked):
        return str(jax.make_jaxpr(jax.grad(function, asked))(x, w)).count("dot_general")

    parts = 2
    assert products(general, 0, 1) == 2 * parts + 2
    assert products(general, 0) == products(general, 1) == 2 * parts + 1
    assert products(weighted, 0, 1) == parts + 2
    assert products(weighted, 0) == products(weighted, 1) == parts + 1
