# SPDX-License-Identifier: Apache-2.0
"""Listed keys are gathered, every KV head once, and multiplied."""

import jax
import jax.numpy as jnp

from ops._varying import common_varying


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
    q, k, indices, counts, layer = common_varying((q, k, indices, counts, layer))
    B, _, N, H = q.shape
    K, M = k.shape[3], indices.shape[-1]
    entry = jnp.arange(M, dtype=jnp.int32)
    sequence = jnp.arange(B, dtype=jnp.int32)[:, None]
    dtype = jnp.promote_types(q.dtype, k.dtype)
    if indices.ndim == 2:
        valid = (entry[None] < counts[:, None])[:, None, None]
        listed = jnp.where(valid[:, 0, 0], indices, 0)
        keys = k[layer, sequence, listed]  # whole tokens
    else:
        valid = (entry[None, None] < counts[:, :, None])[:, :, None]
        listed = jnp.swapaxes(jnp.where(valid[:, :, 0], indices, 0), 1, 2)
        head = jnp.arange(K, dtype=jnp.int32)[None, None]
        keys = k[layer, sequence[:, :, None], listed, head]
    grouped = gqa == "grouped"
    rows = q.reshape(B, K, N // K, H) if grouped else q.reshape(B, N // K, K, H).swapaxes(1, 2)
    products = scale * jnp.einsum(
        "BKGH,BMKH->BKGM",
        rows.astype(dtype),
        keys.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    products = jnp.where(valid, products, -jnp.inf)
    return (products if grouped else products.swapaxes(1, 2)).reshape(B, N, M)
