# SPDX-License-Identifier: Apache-2.0
"""Cache attention by blocks of slots, up to the longest sequence of the batch."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from ops import _online_softmax as online_softmax
from ops import dispatch
from ops._cached_attention_reference import row_slots
from ops._varying import common_varying, varying_like

_SCORE_BYTES = 32 << 20
_SMALLEST_BLOCK = 128
# What a short sequence in a long cache may read too much, against what a turn of the loop costs:
# about 30 us on one H100, where one step at 32768 slots (N 32, K 8, H 128, bfloat16) took 0.84 ms
# by 2048.
_LARGEST_BLOCK = {"cpu": 1024, "gpu": 8192, "tpu": 2048}


def cached_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [L, B, S, K, H]
    v: jax.Array,  # [L, B, S, K, H]
    lengths: jax.Array,  # [B] int32
    layer: jax.Array,  # [] int32
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, H], [B, T, N]
    B, T, N, H = q.shape
    S, K = k.shape[2:4]
    block = block_size(B * T * N, S)
    q, k, v, lengths, layer = common_varying((q, k, v, lengths, layer))
    slots = row_slots(lengths, T)
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)
    dtype = jnp.promote_types(q.dtype, v.dtype)

    def key_block(step, state):
        # The last block overlaps the one before instead of reaching beyond the cache.
        first = jnp.minimum(step * block, S - block)
        keys = first + jnp.arange(block, dtype=jnp.int32)
        # a layer that is sliced out first would be copied
        k_block, v_block = (
            _as_it_lies(jax.lax.dynamic_slice(x, (layer, 0, first, 0, 0), (1, B, block, K, H))[0])
            for x in (k, v)
        )
        scores = scale * jnp.einsum(
            "BKRH,BSKH->BKRS", rows, k_block, preferred_element_type=jnp.float32
        )
        seen = (keys[None, None, :] <= slots[:, :, None]) & (keys >= step * block)[None, None, :]
        grouped = scores.reshape(B, K, -1, T, block)
        scores = jnp.where(seen[:, None, None], grouped, -jnp.inf).reshape(scores.shape)
        return online_softmax.add(state, scores, jnp.swapaxes(v_block.astype(dtype), 1, 2))

    state = varying_like(online_softmax.start(rows.shape[:3], H), q)
    if block == S:
        state = key_block(0, state)
    else:
        longest = jnp.minimum(jnp.max(lengths), S)
        state = jax.lax.fori_loop(0, (longest + block - 1) // block, key_block, state)
    out, lse = online_softmax.finish(state)
    out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    lse = lse.reshape(B, K, N // K, T).transpose(0, 3, 1, 2).reshape(B, T, N)
    return out.astype(q.dtype), lse


def _as_it_lies(block: jax.Array) -> jax.Array:
    """XLA for GPUs would rather have heads first, and turn the whole cache around before a loop."""
    return with_layout_constraint(block, Layout(major_to_minor=tuple(range(block.ndim))))


def block_size(rows: int, num_slots: int) -> int:
    """Slots per block: about 32 MiB of float32 scores for `rows` (B * T * N) rows."""
    block = _SCORE_BYTES // (4 * rows)
    largest = _LARGEST_BLOCK.get(dispatch.current_platform(), _LARGEST_BLOCK["cpu"])
    return min(max(block, _SMALLEST_BLOCK), largest, num_slots)
