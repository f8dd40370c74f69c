# SPDX-License-Identifier: Apache-2.0
"""Layers against numpy loops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import layers
from lm.config import LoraConfig, ModelConfig, RopeScaling

CONFIG = ModelConfig(vocab_size=8, head_dim=8, rope_theta=100.0)


def test_rope_rotates_pairs_by_position():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 2, 8)).astype(np.float32)
    positions = np.array([[0, 5, 2]], np.int32)
    got = layers.apply_rope(jnp.asarray(x), layers.rope_table(CONFIG, jnp.asarray(positions)))
    for t, position in enumerate(positions[0]):
        for pair in range(4):
            angle = position / 100.0 ** (pair / 4)
            a, b = x[0, t, :, pair], x[0, t, :, pair + 4]
            expected = a * math.cos(angle) - b * math.sin(angle)
            np.testing.assert_allclose(got[0, t, :, pair], expected, atol=1e-5)
            expected = b * math.cos(angle) + a * math.sin(angle)
            np.testing.assert_allclose(got[0, t, :, pair + 4], expected, atol=1e-5)


def test_rope_scores_depend_on_distance_only():
    key = jax.random.key(0)
    q, k = (jax.random.normal(key, (1, 1, 1, 8)) for key in jax.random.split(key))

    def score(i, j):
        at = [layers.rope_table(CONFIG, jnp.full((1, 1), p)) for p in (i, j)]
        return jnp.vdot(layers.apply_rope(q, at[0]), layers.apply_rope(k, at[1]))

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaling_keeps_fast_and_stretches_slow_dimensions(kind):
    scaling = RopeScaling(kind=kind, factor=8.0, original_max_positions=64)
    config = dataclasses.replace(CONFIG, head_dim=32, rope_theta=10000.0)
    plain, _ = layers.rope_frequencies(config)
    scaled, factor = layers.rope_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    ratio = np.asarray(plain / scaled)
    np.testing.assert_allclose(ratio[-1], 8.0, rtol=1e-5)
    np.testing.assert_allclose(ratio[0], 8.0 if kind == "linear" else 1.0, rtol=1e-5)
    assert (np.diff(ratio) >= -1e-5).all()
    assert factor == pytest.approx(0.1 * math.log(8) + 1 if kind == "yarn" else 1.0)


@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(plus_one):
    x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    norm = layers.RMSNorm(16, eps=1e-3, plus_one=plus_one)
    norm.scale[...] = jnp.linspace(0.5, 2, 16)
    scale = np.linspace(0.5, 2, 16) + plus_one
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_linear_with_bias_and_adapter():
    rngs = nnx.Rngs(params=jax.random.key(0))
    lora = LoraConfig(rank=3, alpha=6.0)
    linear = layers.Linear((4, 5), (2, 6), rngs=rngs, bias=True, lora=lora)
    linear.bias[...] = jnp.arange(12.0).reshape(2, 6)
    x = jax.random.normal(jax.random.key(1), (7, 3, 4, 5))
    base = jnp.einsum("btij,ijkl->btkl", x, linear.kernel[...]) + linear.bias[...][None, None]
    np.testing.assert_allclose(linear(x), base, atol=1e-5)  # B starts at zero
    linear.lora_b[...] = jax.random.normal(jax.random.key(2), (3, 2, 6))
    update = jnp.einsum("btij,ijr,rkl->btkl", x, linear.lora_a[...], linear.lora_b[...])
    np.testing.assert_allclose(linear(x), base + 2.0 * update, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_row_that_is_read_often_has_the_whole_gradient(dtype):
    """A sum of ones in bfloat16 stops at 256."""
    rows = jnp.asarray([[0] * 3000 + [2, 3], [0] * 2000 + [2] * 1002])
    table = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), dtype)
    out, pull = jax.vjp(layers.lookup, table, rows)
    np.testing.assert_array_equal(out, np.asarray(table)[np.asarray(rows)])
    gradient, _ = pull(jnp.ones_like(out))
    assert gradient.dtype == table.dtype
    expected = np.repeat([[5000], [0], [1003], [1]], 2, axis=1)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), expected, rtol=2**-8)
