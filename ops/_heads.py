# SPDX-License-Identifier: Apache-2.0
"""What every attention op requires of its arrays."""

import jax
import jax.numpy as jnp


def check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises ValueError unless q [B, T, N, H] and k, v [B, S, K, H] fit together and K divides
    N."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k and v must have four dimensions: {shapes}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q [B, T, N, H] and k, v [B, S, K, H] do not fit together: {shapes}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"every dimension must be at least 1: {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key and value heads: {shapes}")
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {array.dtype}")
