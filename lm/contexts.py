# SPDX-License-Identifier: Apache-2.0
"""Attention contexts: what a token may attend to, and where keys and values are kept.

The model calls `context.attend(state, layer, q, k, v)` once a layer, threading `state` through the
scan over layers. Training and decoding, and every later method, differ only in the context that
they pass.
"""

import dataclasses
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm import layers
from lm.config import ModelConfig
from lm.sharding import Sharding
from ops.cached_attention import cached_attention
from ops.masked_attention import masked_attention
from ops.visibility import Visibility


class Context(Protocol):
    """The contract of every context."""

    @property
    def state(self) -> Any:
        """A pytree carried through the layers: a cache, or ()."""

    def rope(self, config: ModelConfig, positions: jax.Array) -> layers.RopeTable | None:
        """What `layers.apply_rope` turns queries and keys by before `attend`; None: nothing, since
        the context does it."""

    def attend(
        self,
        state: Any,
        layer: jax.Array,  # [] int32
        q: jax.Array,  # [B, T, N, H]
        k: jax.Array,  # [B, T, K, H]
        v: jax.Array,  # [B, T, K, H]
    ) -> tuple[jax.Array, Any]:
        """The attention output [B, T, N, H] and the new state."""

    def with_state(self, state: Any) -> Self:
        """This context after the forward pass."""

    def constrain(self, x: jax.Array) -> jax.Array:
        """Pins the sharding of activations [B, T, D]."""


def _static(default: Any = None) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


class Sharded:
    """What all contexts share: activations are split over the batch, queries and keys turned by
    their positions."""

    sharding: Sharding | None

    def rope(self, config: ModelConfig, positions: jax.Array) -> layers.RopeTable | None:
        return layers.rope_table(config, positions)

    def constrain(self, x: jax.Array) -> jax.Array:
        if self.sharding is None:
            return x
        return self.sharding.constrain(x, "batch", None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Training(Sharded):
    """A whole sequence at once under a `Visibility`; nothing is kept."""

    visibility: Visibility
    sharding: Sharding | None = _static()
    implementation: str | None = _static()

    @property
    def state(self) -> tuple[()]:
        return ()

    def with_state(self, state: tuple[()]) -> Self:
        return self

    def attend(self, state, layer, q, k, v):
        return sharded_attention(
            q, k, v, self.visibility, self.sharding, self.implementation
        ), state


def sharded_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    sharding: Sharding | None,
    implementation: str | None,
) -> jax.Array:
    """`masked_attention` with the batch and the heads split over the mesh: kernels see local
    arrays."""

    def attention(q, k, v, visibility):
        return masked_attention(q, k, v, visibility, implementation=implementation)

    if sharding is None:
        return attention(q, k, v, visibility)
    query = sharding.spec("batch", None, "heads", None)
    key = sharding.spec("batch", None, "kv_heads", None)
    rows = jax.tree.map(lambda x: P(sharding.axes("batch"), *[None] * (x.ndim - 1)), visibility)
    return sharding.shard_map(attention, (query, key, key, rows), query)(q, k, v, visibility)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, left-aligned: sequence b holds `lengths[b]` tokens."""

    k: jax.Array  # [L, B, S, K, H]
    v: jax.Array  # [L, B, S, K, H]
    lengths: jax.Array  # [B] int32

    @classmethod
    def empty(cls, config: Any, batch: int, capacity: int) -> Self:
        """A cache for a `ModelConfig`, in its compute dtype."""
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        zeros = jnp.zeros(shape, config.dtype)
        return cls(zeros, zeros, jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        return self.k.shape[2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill(Sharded):
    """Prompts into an empty cache. Rows are ragged: row b has `lengths[b]` tokens, then padding.

    Padding rows compute garbage that nobody reads: keys beyond a prompt lie to the right of its
    rows, and later steps overwrite them.
    """

    cache: Cache
    lengths: jax.Array  # [B] int32
    sharding: Sharding | None = _static()
    implementation: str | None = _static()

    @property
    def state(self) -> tuple[jax.Array, jax.Array]:
        return self.cache.k, self.cache.v

    def with_state(self, state: tuple[jax.Array, jax.Array]) -> Self:
        cache = Cache(*state, self.lengths)
        return dataclasses.replace(self, cache=cache)

    def attend(self, state, layer, q, k, v):
        state = tuple(
            jax.lax.dynamic_update_slice(whole, new[None].astype(whole.dtype), (layer, 0, 0, 0, 0))
            for whole, new in zip(state, (k, v), strict=True)
        )
        # rows of padding see nothing, so their blocks are skipped
        visibility = Visibility(jnp.broadcast_to(self.lengths[:, None], k.shape[:2]))
        out = sharded_attention(q, k, v, visibility, self.sharding, self.implementation)
        return out, state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decode(Sharded):
    """T new tokens a sequence, appended to the cache at `cache.lengths` and attending to all before
    them."""

    cache: Cache
    sharding: Sharding | None = _static()
    implementation: str | None = _static()

    @property
    def state(self) -> tuple[jax.Array, jax.Array]:
        return self.cache.k, self.cache.v

    def with_state(self, state: tuple[jax.Array, jax.Array]) -> Self:
        return dataclasses.replace(
            self, cache=dataclasses.replace(self.cache, k=state[0], v=state[1])
        )

    def attend(self, state, layer, q, k, v):
        arguments = (state, layer, self.cache.lengths, q, k, v)
        if self.sharding is None:
            return self._attend(*arguments)
        # caches are updated where they lie: the scatter must not become a gather of all of them
        split = self.sharding.spec
        query = split("batch", None, "heads", None)
        key = split("batch", None, "kv_heads", None)
        caches = (P(None, *key),) * 2
        specs = (caches, P(), split("batch"), query, key, key)
        return self.sharding.shard_map(self._attend, specs, (query, caches))(*arguments)

    def _attend(self, state, layer, lengths, q, k, v):
        B, T = k.shape[:2]
        rows = jnp.arange(B, dtype=jnp.int32)[:, None]
        slots = lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None]  # [B, T]
        # a finished sequence may stand at its capacity: its writes are dropped, not wrapped
        state = tuple(
            whole.at[layer, rows, slots].set(new.astype(whole.dtype), mode="drop")
            for whole, new in zip(state, (k, v), strict=True)
        )
        lengths = jnp.minimum(lengths + T, state[0].shape[2])
        out = cached_attention(
            q, *state, lengths=lengths, layer=layer, implementation=self.implementation
        )
        return out, state

    def advanced(self, count: jax.Array | int) -> Cache:
        """The cache after `count` ([B] or scalar) of the new tokens are kept."""
        return dataclasses.replace(self.cache, lengths=self.cache.lengths + count)
