# SPDX-License-Identifier: Apache-2.0
"""The best slots, by the sort that XLA has."""

import jax
import jax.numpy as jnp


def top_tokens(
    scores: jax.Array,  # [R, S] float32
    k: int,
    begin: jax.Array,  # [R] int32 in 0 .. S
    end: jax.Array,  # [R] int32 in 0 .. S
) -> tuple[jax.Array, jax.Array]:  # [R, k] int32, [R] int32
    S = scores.shape[1]
    counts = jnp.clip(end - begin, 0, k)
    _, order = jax.lax.top_k(ordered_keys(scores, begin, end), min(k, S))
    order = jnp.pad(order, ((0, 0), (0, max(0, k - S))))
    picked = jnp.where(jnp.arange(k)[None] < counts[:, None], order, S)
    return jnp.sort(picked, axis=1), counts


def ordered_keys(scores: jax.Array, begin: jax.Array, end: jax.Array) -> jax.Array:
    """[R, S] int32 that order as the scores do; what lies outside the range is below -inf."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    keys = jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)
    slots = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
    inside = (slots >= begin[:, None]) & (slots < end[:, None])
    return jnp.where(inside, keys, jnp.iinfo(jnp.int32).min)
