# SPDX-License-Identifier: Apache-2.0
"""Products with every slot of the cache; the listed ones are taken."""

import jax
import jax.numpy as jnp


def gathered_scores(
    q: jax.Array,  # [B, 1, N, H]
    k: jax.Array,  # [L, B, S, K, H]
    indices: jax.Array,  # [B, M] or [B, K, M] int32
    counts: jax.Array,  # [B] or [B, K] int32
    layer: jax.Array,  # [] int32
    *,
    scale: float,
    gqa: str,
) -> jax.Array:  # [B, N, M]
    B, _, N, _ = q.shape
    K, M = k.shape[3], indices.shape[-1]
    if indices.ndim == 2:
        indices = jnp.broadcast_to(indices[:, None], (B, K, M))
        counts = jnp.broadcast_to(counts[:, None], (B, K))
    head = jnp.arange(N)
    head = head % K if gqa == "modulo" else head // (N // K)
    keys = k[layer].astype(jnp.float32)[:, :, head]
    products = scale * jnp.einsum("BNH,BSNH->BNS", q[:, 0].astype(jnp.float32), keys)
    valid = jnp.arange(M, dtype=jnp.int32)[None, None] < counts[:, head, None]
    listed = jnp.where(valid, indices[:, head], 0)
    return jnp.where(valid, jnp.take_along_axis(products, listed, axis=-1), -jnp.inf)
