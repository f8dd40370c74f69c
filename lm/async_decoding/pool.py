# SPDX-License-Identifier: Apache-2.0
"""One pool of keys and values per request, entries of all threads interleaved in time, and the
attention context of a step that feeds one token of every active thread.

The prompt fills the first slots; a step appends what it feeds, so the pool holds no gaps and no
entry ever moves. Who may read what is three numbers per row and the owner of each entry
(`ops.pool_attention`), and the pool is read once for all threads.

Positions come with the tokens and need not be slots. So methods that keep other entries of a prompt
attach here (`evicted`, `selected`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm import contexts, generate, transformer
from lm.async_decoding.threads import Feed
from lm.config import ModelConfig
from lm.sharding import Sharding
from ops.pool_attention import pool_attention

Params = transformer.Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Keys and values of all layers, and the thread that wrote each entry."""

    k: jax.Array  # [L, B, S, K, H]
    v: jax.Array  # [L, B, S, K, H]
    owners: jax.Array  # [B, S] int32

    def placed(self, sharding: Sharding) -> "Pool":
        """Split over sequences and heads."""
        k, v = (
            sharding.constrain(x, None, "batch", None, "kv_heads", None) for x in (self.k, self.v)
        )
        return Pool(k, v, sharding.constrain(self.owners, "batch", None))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threads(contexts.Sharded):
    """One token of every thread, written to the pool before any of them attends: so a `</async>`
    that is fed beside the `<sync/>` is seen by it."""

    pool: Pool  # with the owners of what is fed
    rows: Feed
    lengths: jax.Array  # [B] int32, filled slots, what is fed included
    sharding: Sharding | None = dataclasses.field(default=None, metadata={"static": True})
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def state(self) -> tuple[jax.Array, jax.Array]:
        return self.pool.k, self.pool.v

    def with_state(self, state: tuple[jax.Array, jax.Array]) -> "Threads":
        pool = dataclasses.replace(self.pool, k=state[0], v=state[1])
        return dataclasses.replace(self, pool=pool)

    def attend(self, state, layer, q, k, v):
        rows = self.rows
        rules = (self.pool.owners, rows.threads, rows.joined, rows.forks, self.lengths, rows.slots)
        arguments = (state, layer, q, k, v, rules)
        if self.sharding is None:
            return self._attend(*arguments)
        # the pool is updated where it lies: the scatter must not become a gather of all of it
        split = self.sharding.spec
        query, key = split("batch", None, "heads", None), split("batch", None, "kv_heads", None)
        pools = (P(None, *key),) * 2
        of_rows = tuple(split("batch", *[None] * (x.ndim - 1)) for x in rules)
        specs = (pools, P(), query, key, key, of_rows)
        return self.sharding.shard_map(self._attend, specs, (query, pools))(*arguments)

    def _attend(self, state, layer, q, k, v, rules):
        owners, threads, joined, forks, lengths, slots = rules
        request = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
        keys, values = (
            whole.at[layer, request, slots].set(new.astype(whole.dtype), mode="drop")
            for whole, new in zip(state, (k, v), strict=True)
        )
        out = pool_attention(
            q,
            keys,
            values,
            owners=owners,
            threads=threads,
            joined=joined,
            forks=forks,
            lengths=lengths,
            layer=layer,
            implementation=self.implementation,
        )
        return out, (keys, values)


def prefill(
    model: ModelConfig,
    params: Params,
    tokens: jax.Array,  # [B, T] int32, padded on the right
    lengths: jax.Array,  # [B] int32
    capacity: int,
    *,
    sharding: Sharding | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Pool]:
    """Logits [B, V] float32 after the last token of every prompt, and the pool with the prompts,
    which belong to main."""
    logits, cache = generate.prefill_logits(
        model, params, tokens, lengths, capacity, sharding=sharding, implementation=implementation
    )
    return logits, Pool(cache.k, cache.v, jnp.zeros((tokens.shape[0], capacity), jnp.int32))


def logits(
    model: ModelConfig,
    params: Params,
    rows: Feed,
    lengths: jax.Array,  # [B] int32, filled slots with what is fed
    pool: Pool,
    *,
    sharding: Sharding | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Pool]:
    """Logits [B, M, V] float32 after what each row is fed, and the pool with it; those of rows that
    are not fed mean nothing."""
    request = jnp.arange(rows.slots.shape[0], dtype=jnp.int32)[:, None]
    owners = pool.owners.at[request, rows.slots].set(rows.threads, mode="drop")
    pool = dataclasses.replace(pool, owners=owners)
    context = Threads(pool, rows, lengths, sharding, implementation)
    states, context = transformer.hidden(model, params, rows.tokens, rows.positions, context)
    return transformer.logits(model, params, states), context.pool
