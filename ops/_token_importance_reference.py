# SPDX-License-Identifier: Apache-2.0
"""Importance of cached tokens from the dense [B, N, W, S] products."""

import jax
import jax.numpy as jnp


def token_importance(
    q: jax.Array,  # [B, W, N, H]
    k: jax.Array,  # [L, B, S, K, H]
    begin: jax.Array,  # [B] int32 in 0 .. S
    end: jax.Array,  # [B, W] int32 in 0 .. S
    layer: jax.Array,  # [] int32
    k_scale: jax.Array | None,  # [L, B, S, K]
    row_weights: jax.Array | None,  # [B, W] float32
    head_weights: jax.Array | None,  # [N] float32
    *,
    scale: float,
    normalize: bool,
    reduce: str,
    heads: str,
    gqa: str,
    return_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
    B, W, N, _ = q.shape
    S, K = k.shape[2:4]
    keys = k[layer].astype(jnp.float32)
    if k_scale is not None:
        keys = keys * k_scale[layer].astype(jnp.float32)[..., None]
    reads = jnp.arange(N) // (N // K) if gqa == "grouped" else jnp.arange(N) % K
    products = scale * jnp.einsum("BWNH,BSNH->BNWS", q.astype(jnp.float32), keys[:, :, reads])
    slots = jnp.arange(S, dtype=jnp.int32)[None, None]
    seen = (slots >= begin[:, None, None]) & (slots < end[:, :, None])  # [B, W, S]
    products = jnp.where(seen[:, None], products, -jnp.inf)
    lse = jax.nn.logsumexp(products, axis=-1)  # [B, N, W]
    if normalize:
        products = jnp.exp(products - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])
    if row_weights is not None:
        products = products * row_weights[:, None, :, None]
    if head_weights is not None:
        products = products * head_weights[None, :, None, None]

    if heads == "all":
        groups = products.reshape(B, 1, N * W, S)
    elif heads == "query":
        groups = products
    else:
        order = jnp.argsort(reads, stable=True)
        groups = products[:, order].reshape(B, K, N // K * W, S)
    axes = groups.shape[1], groups.shape[2] // W
    seen_by = jnp.broadcast_to(seen[:, None, None], (B, *axes, W, S)).reshape(groups.shape)
    if reduce == "max":
        scores = jnp.max(groups, axis=2, where=seen_by, initial=-jnp.inf)
    else:
        scores = jnp.sum(groups, axis=2, where=seen_by)
    if reduce == "mean":
        rows = jnp.sum(jnp.any(seen, axis=2), axis=1)
        scores = scores / (jnp.maximum(rows, 1) * axes[1])[:, None, None]
    nobody = ~jnp.any(seen, axis=1)[:, None]
    scores = jnp.where(nobody, 0.0 if normalize else -jnp.inf, scores)
    return scores[:, 0] if heads == "all" else scores, jnp.swapaxes(lse, 1, 2)
