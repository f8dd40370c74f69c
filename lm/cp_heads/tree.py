# SPDX-License-Identifier: Apache-2.0
"""Decoding with several drafts at once: a tree of chains from one root, in one trunk call.

The T = 1 + C n new tokens of a sequence are laid out root first, then chain after chain. They see
each other under a `Visibility` (`until` = end of the own chain) and all of the cache, which is left
alone; the two parts are merged exactly. Only the path that is kept is written into the cache.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm import contexts
from lm.sharding import Sharding
from ops.cached_attention import cached_attention
from ops.masked_attention import masked_attention
from ops.merge_attention import merge_attention
from ops.visibility import Visibility

State = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TreeDecode(contexts.Sharded):
    """New tokens as a tree after `cache.lengths` tokens; the state holds their keys and values."""

    cache: contexts.Cache
    state: State  # [L, B, T, K, H] twice
    chains: int = dataclasses.field(metadata={"static": True})  # C
    length: int = dataclasses.field(metadata={"static": True})  # n
    sharding: Sharding | None = dataclasses.field(default=None, metadata={"static": True})
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def empty(
        cls,
        cache: contexts.Cache,
        chains: int,
        length: int,
        sharding: Sharding | None = None,
        implementation: str | None = None,
    ) -> Self:
        """Before the forward pass."""
        L, B, _, K, H = cache.k.shape
        zeros = jnp.zeros((L, B, 1 + chains * length, K, H), cache.k.dtype)
        if sharding is not None:
            zeros = sharding.constrain(zeros, None, "batch", None, "kv_heads", None)
        return cls(cache, (zeros, zeros), chains, length, sharding, implementation)

    @property
    def depths(self) -> jax.Array:
        """[T] int32: how far each token is from the root."""
        chain = jnp.arange(1, self.length + 1, dtype=jnp.int32)
        return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.tile(chain, self.chains)])

    @property
    def visibility(self) -> Visibility:
        """Of the new tokens among themselves; [B, T]."""
        total = 1 + self.chains * self.length
        ends = 1 + self.length * jnp.arange(1, self.chains + 1, dtype=jnp.int32)
        until = jnp.append(jnp.full(1, total, jnp.int32), jnp.repeat(ends, self.length))
        return Visibility(jnp.broadcast_to(until[None], (self.cache.k.shape[1], total)))

    def with_state(self, state: State) -> Self:
        return dataclasses.replace(self, state=state)

    def attend(self, state, layer, q, k, v):
        state = tuple(
            jax.lax.dynamic_update_slice(whole, new[None].astype(whole.dtype), (layer, 0, 0, 0, 0))
            for whole, new in zip(state, (k, v), strict=True)
        )
        caches = (self.cache.k, self.cache.v)
        arguments = (caches, layer, self.cache.lengths, q, k, v, self.visibility)
        if self.sharding is None:
            return self._attend(*arguments), state
        split = self.sharding.spec
        query = split("batch", None, "heads", None)
        key = split("batch", None, "kv_heads", None)
        rows = jax.tree.map(lambda x: split("batch", None), self.visibility)
        specs = ((P(None, *key),) * 2, P(), split("batch"), query, key, key, rows)
        return self.sharding.shard_map(self._attend, specs, query)(*arguments), state

    def _attend(self, caches, layer, lengths, q, k, v, visibility):
        B, T, N, H = q.shape
        K = k.shape[2]
        keys, values = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in caches)
        # every new token sees the whole prefix, so they may share a row as so many more heads
        folded = q.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, 1, -1, H)
        out, lse = cached_attention(
            folded,
            keys,
            values,
            lengths=lengths,
            return_lse=True,
            implementation=self.implementation,
        )
        prefix = (
            out.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H),
            lse.reshape(B, K, T, N // K).transpose(0, 2, 1, 3).reshape(B, T, N),
        )
        among = masked_attention(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            visibility,
            return_lse=True,
            implementation=self.implementation,
        )
        return merge_attention([prefix, among])[0]

    def committed(self, rows: jax.Array, count: jax.Array) -> contexts.Cache:
        """The cache with the first `count` [B] of the new tokens `rows` [B, n + 1] appended."""

        def append(caches, new, lengths, rows):
            B, width = rows.shape
            own = jnp.arange(B, dtype=jnp.int32)[:, None]
            slots = lengths[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
            return tuple(
                whole.at[:, own, slots].set(
                    jnp.take_along_axis(x, rows[None, :, :, None, None], axis=2), mode="drop"
                )
                for whole, x in zip(caches, new, strict=True)
            )

        caches = (self.cache.k, self.cache.v)
        arguments = (caches, self.state, self.cache.lengths, rows)
        if self.sharding is not None:
            split = self.sharding.spec
            whole = (P(None, *split("batch", None, "kv_heads", None)),) * 2
            specs = (whole, whole, split("batch"), split("batch", None))
            append = self.sharding.shard_map(append, specs, whole)
        k, v = append(*arguments)
        return contexts.Cache(k, v, self.cache.lengths + count)
