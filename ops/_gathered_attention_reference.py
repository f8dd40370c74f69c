# SPDX-License-Identifier: Apache-2.0
"""Attention over the listed slots, gathered for every KV head, with a dense mask."""

import jax
import jax.numpy as jnp

from ops._cached_attention_reference import row_slots


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
    if indices.ndim == 2:
        indices = jnp.broadcast_to(indices[:, None], (B, K, M))
        counts = jnp.broadcast_to(counts[:, None], (B, K))
    valid = jnp.arange(M, dtype=jnp.int32)[None, None] < counts[:, :, None]
    indices = jnp.where(valid, indices, 0)
    by_head = (jnp.moveaxis(x[layer], 2, 1) for x in (k, v))  # [B, K, S, H]
    keys, values = (jnp.take_along_axis(x, indices[..., None], axis=2) for x in by_head)
    if rope is not None:
        keys = rotate(keys, *rope)

    seen = valid[:, :, None] & (indices[:, :, None] <= row_slots(lengths, T)[:, None, :, None])
    seen = seen[:, :, None]  # [B, K, 1, T, M]
    rows = q.astype(jnp.float32).reshape(B, T, K, N // K, H)
    scores = scale * jnp.einsum("BTKGH,BKMH->BKGTM", rows, keys.astype(jnp.float32))
    scores = jnp.where(seen, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])
    out = jnp.einsum("BKGTM,BKMH->BTKGH", weights, values.astype(jnp.float32))
    lse = lse.transpose(0, 3, 1, 2).reshape(B, T, N)
    return out.reshape(B, T, N, H).astype(q.dtype), lse


def rotate(keys: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of keys [B, K, M, H], half against half; in float32, rounded to the keys'
    type."""
    cos, sin = (jnp.broadcast_to(x, (*keys.shape[:-1], x.shape[-1])) for x in (cos, sin))
    first, second = jnp.split(keys.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(keys.dtype)
