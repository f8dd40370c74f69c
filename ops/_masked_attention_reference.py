# SPDX-License-Identifier: Apache-2.0
"""Attention with a dense mask, differentiated by jax: what the other implementations are tested
against."""

import jax
import jax.numpy as jnp

from ops.visibility import Visibility


def masked_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    visibility: Visibility,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, H], [B, T, N]
    return dense_attention(q, k, v, visibility.as_array(q.shape[1]), scale=scale)


def dense_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    mask: jax.Array,  # [B, T, S] bool
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, H], [B, T, N]
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.astype(jnp.float32).reshape(B, T, K, N // K, H)
    scores = scale * jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k.astype(jnp.float32))
    mask = mask[:, None, None, :, :]
    # `where` on both sides of exp keeps the gradients of invisible pairs zero instead of NaN.
    largest = jnp.max(scores, axis=-1, where=mask, initial=-jnp.inf, keepdims=True)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - largest, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    sees = total > 0
    weights = weights / jnp.where(sees, total, 1.0)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v.astype(jnp.float32))
    lse = jnp.where(sees, largest + jnp.log(jnp.where(sees, total, 1.0)), -jnp.inf)[..., 0]
    return out.reshape(B, T, N, H).astype(q.dtype), jnp.moveaxis(lse, 3, 1).reshape(B, T, N)
