# SPDX-License-Identifier: Apache-2.0
"""Caches of one layer or of all layers: ops see them as stacks, so that a layer is never copied out
of one."""

import jax
import jax.numpy as jnp


def layer_index(layer: int | jax.Array | None) -> jax.Array:
    """`layer` as an int32 scalar; None, a cache of one layer, is 0. Raises ValueError for anything
    but one integer."""
    index = jnp.asarray(0 if layer is None else layer)
    if index.shape or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"layer must be one integer, got {index.shape} {index.dtype}")
    return index.astype(jnp.int32)


def stacked(
    name: str, cache: jax.Array, layer: int | jax.Array | None, dims: str
) -> jax.Array:  # [L, *dims]
    """Raises ValueError unless the cache has the dimensions `dims`, after those of L with
    `layer`."""
    number = len(dims.split())
    if cache.ndim != number + (layer is not None):
        expected = f"[{dims}] without layer" if layer is None else f"[L {dims}] with layer"
        raise ValueError(f"{name} must be {expected}, got {cache.shape}")
    return cache[None] if layer is None else cache


def compute_dtype(q: jax.Array, cache: jax.Array) -> jnp.dtype:
    """What products are taken in: codes of 8 bits are exact in every type that q may have."""
    return q.dtype if cache.dtype.itemsize == 1 else jnp.promote_types(q.dtype, cache.dtype)
