# SPDX-License-Identifier: Apache-2.0
"""Writing into the cache and its 8-bit shadow, and dense attention over raw and rotated keys."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lm import layers
from lm.config import ModelConfig
from lm.long_context import cache

MODEL = ModelConfig(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=8)
B, S, K, H = 3, 12, 2, 8


write, take, put = (jax.jit(f) for f in (cache.write, cache.take, cache.put))
rope_table = jax.jit(layers.rope_table, static_argnums=0)
apply_rope = jax.jit(layers.apply_rope)
dense_attention = jax.jit(cache.dense_attention, static_argnames=("config", "rope"))


def filled(shadow=""):
    rng = np.random.default_rng(0)
    made = cache.Cache.empty(MODEL, B, S, shadow=shadow)
    k, v = rng.normal(size=(2, B, S, K, H)).astype(np.float32)
    return write(made.buffers, 1, k, v, np.int32(0)), k, v


@pytest.mark.parametrize("shadow", ["", "int8", "fp8"])
def test_writes_go_where_they_belong(shadow):
    buffers, k, v = filled(shadow)
    new = np.full((B, 2, K, H), 5.0, np.float32)
    starts = np.array([0, 7, 11], np.int32)  # the last one's second row is beyond the buffers
    got = write(buffers, 1, new, -new, starts)
    for b, start in enumerate((0, 7, 11)):
        k[b, start : start + 2], v[b, start : start + 2] = 5.0, -5.0
    np.testing.assert_array_equal(got.k[1], k)
    np.testing.assert_array_equal(got.v[1], v)
    assert not np.any(got.k[0])
    assert not np.any(got.v[0])
    chunk = write(got, 0, new, new, np.int32(4))
    assert np.all(chunk.k[0, :, 4:6] == 5)
    assert not np.any(chunk.k[0, :, 6:])
    if not shadow:
        assert got.codes is None
        assert got.scales is None
        return
    back = np.asarray(got.codes[1]).astype(np.float32) * np.asarray(got.scales[1])[..., None]
    step = np.abs(k).max(axis=-1, keepdims=True) / 127
    limit = step / 2 if shadow == "int8" else np.maximum(np.abs(k) / 16, step / 2)
    assert np.all(np.abs(back - k) <= 1.001 * limit)


def test_codes_are_those_of_the_format():
    k = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    k[3] = 0
    for name, largest in (("int8", 127.0), ("fp8", 448.0)):
        codes, scales = jax.device_get(cache.shadow(jnp.asarray(k), cache.SHADOWS[name]))
        np.testing.assert_allclose(scales, np.abs(k).max(axis=1) / largest, rtol=1e-6)
        whole = k / np.where(scales > 0, scales, 1)[:, None]
        kind = np.int8 if name == "int8" else ml_dtypes.float8_e4m3fn
        wanted = np.round(whole) if name == "int8" else whole
        got, wanted = codes.astype(np.float32), wanted.astype(kind).astype(np.float32)
        # a last bit of the quotient may fall either way
        assert np.mean(got != wanted) < 0.02
        assert np.abs(got).max() == largest
        assert not np.any(codes[3].astype(np.float32))


def test_take_and_put_one_token_a_sequence():
    buffers, k, _ = filled("int8")
    slots = np.array([0, 5, 12], np.int32)
    rows = take(buffers, slots)
    np.testing.assert_array_equal(rows.k[1, :2], k[[0, 1], [0, 5]])
    back = put(buffers, slots, jax.tree.map(lambda x: np.asarray(x) + np.ones((), x.dtype), rows))
    for whole, old in zip(back, buffers, strict=True):
        changed = np.argwhere(
            (np.asarray(whole) != np.asarray(old)).reshape(2, B, S, -1).any(axis=-1)
        )
        assert {(b, s) for _, b, s in changed.tolist()} == {(0, 0), (1, 5)}


@pytest.mark.parametrize("rows", [1, 4])
def test_raw_and_rotated_keys_attend_alike(rows):
    raw, k, v = filled()
    rng = np.random.default_rng(1)
    q = rng.normal(size=(B, rows, 4, H)).astype(np.float32)
    starts = np.array([8, 3, 0], np.int32)
    positions = starts[:, None] + np.arange(rows, dtype=np.int32)[None]
    turned = apply_rope(k, rope_table(MODEL, np.arange(S, dtype=np.int32)[None]))
    written = write(raw, 1, turned, v, np.int32(0))
    got = dense_attention(raw, 1, q, starts, config=MODEL, rope="read")
    rotated = apply_rope(q, rope_table(MODEL, positions))
    wanted = dense_attention(written, 1, rotated, starts, config=MODEL, rope="write")
    np.testing.assert_allclose(got, wanted, atol=1e-5)
