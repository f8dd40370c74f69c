# SPDX-License-Identifier: Apache-2.0
"""Prompts in chunks against whole prompts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import contexts, sharding, transformer
from lm.config import MeshConfig, ModelConfig
from lm.errors import UserError
from lm.long_context import cache, chunks

MODEL = ModelConfig(
    vocab_size=32, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24
)
LENGTHS = np.array([21, 0, 8, 3], np.int32)


@functools.cache
def params():
    return jax.tree.map(lambda x: 2 * x, transformer.init(MODEL, jax.random.key(0)))


def tokens():
    return np.random.default_rng(0).integers(0, 32, (4, 24)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def chunked(chunk, keys, split, params, tokens, lengths):
    made = cache.Cache.empty(MODEL, len(lengths), tokens.shape[1], rope=keys, sharding=split)

    def context(state, start, rows):
        return chunks.Chunk(state, start, MODEL, keys, split)

    return chunks.prefill(MODEL, params, tokens, lengths, made.buffers, context, chunk=chunk)


@functools.cache
def whole():
    """States of the last tokens, and the cache, of one forward pass over padded prompts."""
    made = contexts.Cache.empty(MODEL, 4, 24)
    context = contexts.Prefill(made, jnp.asarray(LENGTHS))
    positions = jnp.broadcast_to(jnp.arange(24)[None], (4, 24))
    states, context = transformer.hidden(MODEL, params(), tokens(), positions, context)
    last = np.asarray(states)[np.arange(4), np.maximum(LENGTHS, 1) - 1]
    return np.where(LENGTHS[:, None] > 0, last, 0), context.cache


@pytest.mark.parametrize(("chunk", "keys"), [(8, "write"), (8, "read"), (3, "write")])
def test_chunks_are_the_prompt(chunk, keys):
    last, made = chunked(chunk, keys, None, params(), tokens(), LENGTHS)
    wanted, plain = whole()
    np.testing.assert_allclose(last, wanted, rtol=1e-5, atol=2e-5)
    for b, n in enumerate(LENGTHS):
        np.testing.assert_allclose(made.v[:, b, :n], plain.v[:, b, :n], rtol=1e-5, atol=2e-5)
        if keys == "write":
            np.testing.assert_allclose(made.k[:, b, :n], plain.k[:, b, :n], rtol=1e-5, atol=2e-5)


def test_the_number_of_chunks_is_no_part_of_the_program():
    before = chunked._cache_size()
    for longest in (3, 9, 21):
        lengths = np.minimum(LENGTHS, longest)
        last, _ = chunked(8, "write", None, params(), tokens(), lengths)
        assert np.any(last[0])
        assert not np.any(last[1])
    assert chunked._cache_size() <= before + 1
    short, _ = chunked(8, "write", None, params(), tokens(), LENGTHS)
    np.testing.assert_allclose(short, whole()[0], rtol=1e-5, atol=2e-5)


def test_four_devices_equal_one():
    split = sharding.make(MeshConfig(data=2, fsdp=1, tensor=2), MODEL)
    weights = jax.device_put(params(), split.params(params()))
    last, made = chunked(8, "write", split, weights, tokens(), LENGTHS)
    np.testing.assert_allclose(last, whole()[0], rtol=1e-5, atol=2e-5)
    assert made.k.sharding.is_equivalent_to(split.named(None, "batch", None, "kv_heads", None), 5)


def test_visible_tokens_only_change_what_follows():
    """Causality across chunks: a token changed changes states of its own prompt from there on."""
    changed = tokens()
    changed[0, 20] += 1
    changed[2, 9] += 1  # padding
    one, _ = chunked(8, "write", None, params(), tokens(), LENGTHS)
    other, made = chunked(8, "write", None, params(), changed % 32, LENGTHS)
    _, plain = chunked(8, "write", None, params(), tokens(), LENGTHS)
    assert np.any(one[0] != other[0])
    np.testing.assert_array_equal(one[2:], other[2:])
    np.testing.assert_array_equal(made.k[:, 0, :20], plain.k[:, 0, :20])


def test_room_for_prompts():
    assert chunks.room([5, 100], 10, 16) == (128, 192)
    assert chunks.room([65], 10, 16) == (128, 192)  # the bucket's, whatever the length
    assert chunks.room([100], 10, 512) == (512, 512)
    assert chunks.room([600], 100, 512, capacity=700) == (1024, 1024)
    assert chunks.room([16], 4, 8, capacity=20) == (16, 64)
    with pytest.raises(UserError, match=r"prompt 1 has 100 tokens and 10 new .* capacity of 109"):
        chunks.room([5, 100], 10, 16, capacity=109)


def test_prompts_are_whole_chunks():
    with pytest.raises(ValueError, match="24 token slots are not a multiple of chunks of 5"):
        chunked(5, "write", None, params(), tokens(), LENGTHS)
