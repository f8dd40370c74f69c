# SPDX-License-Identifier: Apache-2.0
"""Attention over the whole cache with a dense mask."""

import jax
import jax.numpy as jnp

from ops._masked_attention_reference import dense_attention


def cached_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [L, B, S, K, H]
    v: jax.Array,  # [L, B, S, K, H]
    lengths: jax.Array,  # [B] int32
    layer: jax.Array,  # [] int32
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, H], [B, T, N]
    k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k, v))
    slots = row_slots(lengths, q.shape[1])
    keys = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
    return dense_attention(q, k, v, keys[:, None, :] <= slots[:, :, None], scale=scale)


def row_slots(lengths: jax.Array, num_rows: int) -> jax.Array:
    """[B, T]: the slot of each new token."""
    return (lengths - num_rows)[:, None] + jnp.arange(num_rows, dtype=jnp.int32)[None, :]
