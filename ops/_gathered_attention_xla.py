# SPDX-License-Identifier: Apache-2.0
"""Attention over the listed slots: one gather out of the stacked cache, then blocks of entries."""

import jax
import jax.numpy as jnp

from ops import _online_softmax as online_softmax
from ops._cached_attention_reference import row_slots
from ops._gathered_attention_reference import rotate
from ops._varying import common_varying, varying_like

_SCORE_BYTES = 32 << 20
_SMALLEST_BLOCK = 128


def gathered_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [L, B, S, K, H]
    v: jax.Array,  # [L, B, S, K, H]
    indices: jax.Array,  # [B, M] or [B, K, M] int32
    counts: jax.Array,  # [B] or [B, K] int32
    lengths: jax.Array,  # [B] int32
    layer: jax.Array,  # [] int32
    rope: tuple[jax.Array, jax.Array] | None,  # each [B or 1, K or 1, M, H/2] float32
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, H], [B, T, N]
    B, T, N, H = q.shape
    K, M = k.shape[3], indices.shape[-1]
    q, k, v, indices, counts, lengths, layer, rope = common_varying(
        (q, k, v, indices, counts, lengths, layer, rope)
    )
    entries = jnp.arange(M, dtype=jnp.int32)
    shape = (1,) * counts.ndim + (M,)
    valid = entries.reshape(shape) < counts[..., None]  # [B, M] or [B, K, M]
    indices = jnp.where(valid, indices, 0)
    keys, values = (_gather(x, layer, indices) for x in (k, v))  # [B, K, M, H]
    if rope is not None:
        keys = rotate(keys, *rope)
    # An entry is visible from the row in its slot on.
    first_row = jnp.where(valid, indices, jnp.iinfo(jnp.int32).max)
    first_row = first_row[:, None] if first_row.ndim == 2 else first_row  # [B, 1 or K, M]
    slots = row_slots(lengths, T)[:, None, :, None]
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    keys = keys.astype(jnp.promote_types(q.dtype, k.dtype))
    values = values.astype(jnp.promote_types(q.dtype, v.dtype))
    block = block_size(B * T * N, M)

    def add(step, state):
        # The last block overlaps the one before instead of reaching beyond the list.
        first = jnp.minimum(step * block, M - block)
        keys_block, values_block, visible_from = (
            jax.lax.dynamic_slice_in_dim(x, first, block, axis=2) for x in (keys, values, first_row)
        )
        scores = scale * jnp.einsum(
            "BKRH,BKMH->BKRM", rows, keys_block, preferred_element_type=jnp.float32
        )
        fresh = first + jnp.arange(block, dtype=jnp.int32) >= step * block
        seen = (visible_from[:, :, None] <= slots) & fresh[None, None, None]  # [B, 1 or K, T, M]
        grouped = scores.reshape(B, K, -1, T, block)
        scores = jnp.where(seen[:, :, None], grouped, -jnp.inf).reshape(scores.shape)
        return online_softmax.add(state, scores, values_block)

    state = varying_like(online_softmax.start(rows.shape[:3], H), q)
    if block == M:
        state = add(0, state)
    else:
        longest = jnp.clip(jnp.max(counts), 0, M)
        state = jax.lax.fori_loop(0, (longest + block - 1) // block, add, state)
    out, lse = online_softmax.finish(state)
    out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    lse = lse.reshape(B, K, N // K, T).transpose(0, 3, 1, 2).reshape(B, T, N)
    return out.astype(q.dtype), lse


def _gather(cache: jax.Array, layer: jax.Array, indices: jax.Array) -> jax.Array:
    """[B, K, M, H] of [L, B, S, K, H]; reads the listed rows only.

    The gather is indexed by (layer, sequence, slot), never by a position in the flattened cache,
    whose number of elements may pass 2^31.
    """
    B, K = cache.shape[1], cache.shape[3]
    if indices.ndim == 2:
        sequence = jnp.arange(B, dtype=jnp.int32)[:, None]
        return jnp.moveaxis(cache.at[layer, sequence, indices].get(mode="clip"), 2, 1)
    sequence = jnp.arange(B, dtype=jnp.int32)[:, None, None]
    head = jnp.arange(K, dtype=jnp.int32)[None, :, None]
    return cache.at[layer, sequence, indices, head].get(mode="clip")


def block_size(rows: int, num_entries: int) -> int:
    """Entries per block: about 32 MiB of float32 scores for `rows` (B * T * N) rows."""
    return min(max(_SCORE_BYTES // (4 * rows), _SMALLEST_BLOCK), num_entries)
