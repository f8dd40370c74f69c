# SPDX-License-Identifier: Apache-2.0
"""The best slots from a full sort."""

import jax
import jax.numpy as jnp


def top_tokens(
    scores: jax.Array,  # [R, S] float32
    k: int,
    begin: jax.Array,  # [R] int32 in 0 .. S
    end: jax.Array,  # [R] int32 in 0 .. S
) -> tuple[jax.Array, jax.Array]:  # [R, k] int32, [R] int32
    S = scores.shape[1]
    slots = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), scores.shape)
    outside = (slots < begin[:, None]) | (slots >= end[:, None])
    _, _, order = jax.lax.sort(
        (outside, jnp.where(outside, 0.0, -scores), slots), dimension=1, num_keys=3
    )
    counts = jnp.clip(end - begin, 0, k)
    order = jnp.pad(order[:, :k], ((0, 0), (0, max(0, k - S))))
    picked = jnp.where(jnp.arange(k)[None] < counts[:, None], order, S)
    return jnp.sort(picked, axis=1), counts
