# SPDX-License-Identifier: Apache-2.0
"""Chunks of new tokens over a cache by the kernels of masked attention: the chunk's rows lie at the
end of what is filled, so that causality alone says what they see, and blocks of slots that nobody
has filled yet are never read."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from ops import _masked_attention_mosaic, dispatch
from ops.visibility import Visibility

LEAST_ROWS = 64  # of a tile: fewer would leave most of it idle

Served = tuple[jax.Array, jax.Array]  # [B, T, N, H], [B, T, N]


def served(
    name: str,
    attention: Callable[..., Served],
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [L, B, S, K, H]
    v: jax.Array,  # [L, B, S, K, H]
    lengths: jax.Array,  # [B] int32
    layer: jax.Array,  # [] int32
    *,
    scale: float,
) -> Served:
    """`cached_attention` by an implementation of `masked_attention`. Raises Unsupported."""
    T = q.shape[1]
    if T < LEAST_ROWS:
        raise dispatch.Unsupported(
            f"{name}: serves chunks of {LEAST_ROWS} new tokens and more, not {T}"
        )
    if k.dtype != q.dtype:
        raise dispatch.Unsupported(f"{name}: a cache of {k.dtype} under queries of {q.dtype}")
    # a copy of the layer, which costs little beside a chunk's attention to it
    k, v = (_one_layer(x, layer) for x in (k, v))
    # as many rows as there are; a constant would be folded through the block lists, for seconds
    until = jnp.broadcast_to(lengths[:, None], k.shape[:2])
    visibility = Visibility(until, row_offset=lengths - T)
    return attention(q, k, v, visibility, scale=scale)


def _one_layer(whole: jax.Array, layer: jax.Array) -> jax.Array:
    """One layer of [L, ...] as it lies: XLA for GPUs would rather have other dimensions first, and
    turn the whole cache around before a loop and back after it."""
    one = jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False)
    return with_layout_constraint(one, Layout(major_to_minor=tuple(range(one.ndim))))


mosaic_gpu = functools.partial(served, "mosaic_gpu", _masked_attention_mosaic.masked_attention)
