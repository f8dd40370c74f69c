# SPDX-License-Identifier: Apache-2.0
"""The cache for long contexts: contiguous static buffers, and a copy of the keys in 8 bits.

Keys lie as the projections gave them (`rope` "read": whoever reads them rotates them, so that a
token's position may change) or rotated by their true positions ("write"). The copy, the shadow, is
of the keys as they lie: a scorer reads it for a half of the bytes of bfloat16. Batch and KV heads
are split over a mesh; sequences are left-aligned, and what lies beyond their lengths is finite and
means nothing.
"""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from lm import layers
from lm.config import ModelConfig
from lm.sharding import Sharding
from ops.cached_attention import cached_attention

SHADOWS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


class Buffers(NamedTuple):
    """The arrays of all layers, which the model's scan over layers carries along."""

    k: jax.Array  # [L, B, S, K, H]
    v: jax.Array  # [L, B, S, K, H]
    codes: jax.Array | None = None  # [L, B, S, K, H] int8 or float8_e4m3fn
    scales: jax.Array | None = None  # [L, B, S, K] float32: k is about codes * scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Sequence b holds `lengths[b]` tokens in its first slots."""

    buffers: Buffers  # or what is kept of it, `eviction.cache.Kept`
    lengths: jax.Array  # [B] int32
    rope: str = dataclasses.field(default="read", metadata={"static": True})

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        rope: str = "read",
        shadow: str = "",
        sharding: Sharding | None = None,
    ) -> Self:
        """Zeros in the model's compute dtype; `shadow` is "" or a name in `SHADOWS`."""
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        buffers = Buffers(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
        if shadow:
            codes = jnp.zeros(shape, SHADOWS[shadow])
            buffers = buffers._replace(codes=codes, scales=jnp.zeros(shape[:-1], jnp.float32))
        return cls(placed(buffers, sharding), jnp.zeros(batch, jnp.int32), rope)

    @property
    def capacity(self) -> int:
        return self.buffers.k.shape[2]


def dims(buffers: Buffers) -> Buffers:
    """The logical dimensions of every array, for the rules table of `lm.sharding`."""
    names = (None, "batch", None, "kv_heads", None)
    return Buffers(*(None if x is None else names[: x.ndim] for x in buffers))


def specs(buffers: Buffers, sharding: Sharding) -> Buffers:
    """How the arrays are split."""
    return Buffers(*(None if names is None else sharding.spec(*names) for names in dims(buffers)))


def placed(buffers: Buffers, sharding: Sharding | None) -> Buffers:
    """The arrays pinned to where they belong."""
    if sharding is None:
        return buffers
    pairs = zip(buffers, dims(buffers), strict=True)
    return Buffers(*(None if x is None else sharding.constrain(x, *names) for x, names in pairs))


def write(
    buffers: Buffers,
    layer: jax.Array,  # [] int32
    k: jax.Array,  # [B, T, K, H]
    v: jax.Array,  # [B, T, K, H]
    starts: jax.Array,  # [] or [B] int32
) -> Buffers:
    """New tokens into the slots from `starts` on, with their shadow.

    One start for all ([]) must leave room for all T; of starts per sequence, what would lie beyond
    the buffers is dropped.
    """
    new = Buffers(k, v)
    if buffers.codes is not None:
        new = Buffers(k, v, *shadow(k.astype(buffers.k.dtype), buffers.codes.dtype))

    def one(whole, rows):
        if whole is None:
            return None
        rows = rows.astype(whole.dtype)
        if starts.ndim == 0:
            place = (layer, 0, starts) + (0,) * (whole.ndim - 3)
            return jax.lax.dynamic_update_slice(whole, rows[None], place)
        B, T = rows.shape[:2]
        slots = starts[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        sequences = jnp.arange(B, dtype=jnp.int32)[:, None]
        return whole.at[layer, sequences, slots].set(rows, mode="drop")

    return Buffers(*(one(whole, rows) for whole, rows in zip(buffers, new, strict=True)))


def shadow(k: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Codes [..., H] and scales [...] float32 of keys [..., H]: the largest entry of a token and KV
    head takes the largest code."""
    k = k.astype(jnp.float32)
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float((jnp.iinfo if integer else jnp.finfo)(dtype).max)
    scales = jnp.max(jnp.abs(k), axis=-1) / largest
    codes = k / jnp.where(scales > 0, scales, 1.0)[..., None]
    codes = jnp.round(codes) if integer else codes
    return jnp.clip(codes, -largest, largest).astype(dtype), scales


def take(buffers: Buffers, slots: jax.Array) -> Buffers:
    """What all layers hold in slot `slots[b]` of sequence b: [L, B, ...]."""
    sequences = jnp.arange(slots.shape[0], dtype=jnp.int32)
    return Buffers(*(None if x is None else x[:, sequences, slots] for x in buffers))


def put(buffers: Buffers, slots: jax.Array, rows: Buffers) -> Buffers:
    """Writes what `take` took; slots beyond the buffers are dropped."""
    sequences = jnp.arange(slots.shape[0], dtype=jnp.int32)

    def one(whole, new):
        return None if whole is None else whole.at[:, sequences, slots].set(new, mode="drop")

    return Buffers(*(one(whole, new) for whole, new in zip(buffers, rows, strict=True)))


def dense_attention(
    buffers: Buffers,
    layer: jax.Array,  # [] int32
    q: jax.Array,  # [B, T, N, H]
    starts: jax.Array,  # [B] int32
    *,
    config: ModelConfig,
    rope: str,
    implementation: str | None = None,
) -> jax.Array:
    """Attention [B, T, N, H] of the newest tokens, in the slots from `starts` on, to everything
    before them and to each other up to themselves.

    q comes as the keys lie: rotated for "write"; for "read" it is rotated here and so is a copy of
    one layer's keys, which costs as much memory as they do.
    """
    T, slots = q.shape[1], buffers.k.shape[2]
    k, v, stacked = *buffers[:2], layer
    if rope == "read":
        k, v, stacked = *(one_layer(x, layer) for x in (k, v)), None
        rows = starts[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        q = layers.apply_rope(q, layers.rope_table(config, rows))
        places = jnp.arange(slots, dtype=jnp.int32)[None]
        k = layers.apply_rope(k, layers.rope_table(config, places))
    lengths = jnp.minimum(starts + T, slots)
    return cached_attention(q, k, v, lengths=lengths, layer=stacked, implementation=implementation)


def one_layer(whole: jax.Array, layer: jax.Array) -> jax.Array:
    """One layer of [L, ...] as it lies: XLA for GPUs would rather have other dimensions first, and
    turn the whole cache around before a loop and back after it."""
    one = jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False)
    return with_layout_constraint(one, Layout(major_to_minor=tuple(range(one.ndim))))
