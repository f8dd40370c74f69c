# SPDX-License-Identifier: Apache-2.0
"""Attention over uneven heads by blocks of stored rows: each is read once, in order, and multiplied
with the queries of all heads; a head's queries see its own run of rows."""

import jax
import jax.numpy as jnp

from ops import _cached_attention_xla
from ops import _online_softmax as online_softmax
from ops._varying import common_varying, varying_like
from ops.merge_attention import merge_attention

_SCORE_BYTES = 32 << 20
_SMALLEST_BLOCK = 128


def ragged_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [L, B, R, H]
    v: jax.Array,  # [L, B, R, H]
    starts: jax.Array,  # [B, K] int32
    counts: jax.Array,  # [B, K] int32
    tail: tuple[jax.Array, jax.Array, jax.Array] | None,  # [L, B, S, K, H] twice, [B] int32
    layer: jax.Array,  # [] int32
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, H], [B, T, N]
    q, k, v, starts, counts, tail, layer = common_varying((q, k, v, starts, counts, tail, layer))
    kept = _stored_rows(q, k, v, starts, counts, layer, scale)
    return with_tail(q, kept, tail, layer, scale)


def with_tail(
    q: jax.Array,  # [B, T, N, H]
    kept: tuple[jax.Array, jax.Array],  # [B, T, N, H], [B, T, N]
    tail: tuple[jax.Array, jax.Array, jax.Array] | None,  # [L, B, S, K, H] twice, [B] int32
    layer: jax.Array,  # [] int32
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention over both, from that over what is kept."""
    if tail is None:
        return kept
    k, v, lengths = tail
    k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k, v))
    recent = _cached_attention_xla.cached_attention(
        q, k[None], v[None], lengths, jnp.int32(0), scale=scale
    )
    return merge_attention([kept, recent])


def runs(
    starts: jax.Array, counts: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """First stored row and the one after the last, each [B, T * N], of the queries [B, T, N]."""
    B, T, N = shape
    ends = starts + jnp.maximum(counts, 0)

    def of_queries(x: jax.Array) -> jax.Array:
        x = jnp.repeat(x, N // x.shape[1], axis=1)
        return jnp.broadcast_to(x[:, None], (B, T, N)).reshape(B, T * N)

    return of_queries(starts), of_queries(ends)


def _stored_rows(q, k, v, starts, counts, layer, scale: float) -> tuple[jax.Array, jax.Array]:
    B, T, N, H = q.shape
    R = k.shape[2]
    first_row, end_row = runs(starts, counts, (B, T, N))
    queries = q.reshape(B, T * N, H)
    block = block_size(B * T * N, R)
    types = [jnp.promote_types(q.dtype, x.dtype) for x in (k, v)]

    def add(step, state):
        # The last block overlaps the one before instead of reaching beyond the rows.
        first = jnp.minimum(step * block, R - block)
        keys, values = (
            jax.lax.dynamic_slice(x, (layer, 0, first, 0), (1, B, block, H))[0].astype(dtype)
            for x, dtype in zip((k, v), types, strict=True)
        )
        scores = scale * jnp.einsum(
            "BQH,BRH->BQR", queries, keys, preferred_element_type=jnp.float32
        )
        row = (first + jnp.arange(block, dtype=jnp.int32))[None, None]
        seen = (row >= first_row[:, :, None]) & (row < end_row[:, :, None])
        seen &= row >= step * block
        return online_softmax.add(state, jnp.where(seen, scores, -jnp.inf), values)

    state = varying_like(online_softmax.start((B, T * N), H), q)
    if block == R:
        state = add(0, state)
    else:
        stored = jnp.clip(jnp.max(end_row), 0, R)
        state = jax.lax.fori_loop(0, (stored + block - 1) // block, add, state)
    out, lse = online_softmax.finish(state)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(B, T, N)


def block_size(queries: int, rows: int) -> int:
    """Stored rows per block: about 32 MiB of float32 scores for so many (B * T * N) queries."""
    return min(max(_SCORE_BYTES // (4 * queries), _SMALLEST_BLOCK), rows)
