# SPDX-License-Identifier: Apache-2.0
"""Exact attention over a set of keys from attention over its parts."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge_attention(
    parts: Sequence[tuple[jax.Array, jax.Array]],  # (out [..., H], lse [...]) each
) -> tuple[jax.Array, jax.Array]:
    """Combines (out, lse) of the same rows over disjoint sets of keys, as if all keys had been
    attended at once.

    Differentiable in everything. A part that saw nothing (lse -inf) adds nothing; rows that no part
    saw give zeros and -inf. The result has the shapes of one part: out in the parts' dtype, lse
    float32.

    Raises ValueError when there are no parts or their shapes or dtypes differ.
    """
    if not parts:
        raise ValueError("merge_attention needs at least one part")
    shapes = {(out.shape, lse.shape, out.dtype) for out, lse in parts}
    if len(shapes) > 1 or parts[0][0].shape[:-1] != parts[0][1].shape:
        raise ValueError(
            "parts must all be out [..., H] of one dtype and lse [...], got "
            + "; ".join(f"{out.shape} {out.dtype}, {lse.shape}" for out, lse in parts)
        )
    lse = jnp.stack([lse.astype(jnp.float32) for _, lse in parts])
    out = jnp.stack([out.astype(jnp.float32) for out, _ in parts])
    largest = jax.lax.stop_gradient(jnp.max(lse, axis=0))
    sees = largest > -jnp.inf
    base = jnp.where(sees, largest, 0.0)
    weights = jnp.exp(lse - base[None])
    total = jnp.where(sees, jnp.sum(weights, axis=0), 1.0)
    merged = jnp.sum(weights[..., None] * out, axis=0) / total[..., None]
    return merged.astype(parts[0][0].dtype), jnp.where(sees, base + jnp.log(total), -jnp.inf)
