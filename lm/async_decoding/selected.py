# SPDX-License-Identifier: Apache-2.0
"""Threads that read a part of a long prompt, chosen anew in every layer of every step by a policy
of `lm.long_context.policy`; all that the answer has decoded stays in sight.

The prompt lies in a cache of its own, as the policy wants it, and the pool holds the answer alone.
The rows of a step share one choice: the policy is shown the mean of their queries, as the one new
token after the prompt. What is read of the prompt is merged with what is read of the pool by their
log-sum-exps, so that a choice of everything is the plain decoder up to rounding.

Keys are rotated by their true positions, since a step's rows stand at several.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import contexts, transformer
from lm.async_decoding.composed import Composition
from lm.async_decoding.decode import Forward, Program
from lm.async_decoding.pool import Pool
from lm.async_decoding.threads import Feed
from lm.config import ModelConfig, SamplingConfig
from lm.errors import UserError
from lm.long_context import chunk_major
from lm.long_context import program as long_context
from lm.long_context.cache import Buffers
from lm.long_context.heads import Heads
from lm.long_context.policy import Policy, Read, State, View
from ops.gathered_attention import gathered_attention
from ops.merge_attention import merge_attention
from ops.pool_attention import pool_attention

_MULTIPLE = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """A prompt, and what is answered to it."""

    prompt: Buffers
    policy: State  # [L, B, ...] each
    lengths: jax.Array  # [B] int32, of the prompts
    answer: Pool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading(contexts.Sharded):
    """One token of every thread, as `pool.Threads`, with the prompt apart."""

    pool: Apart  # with the owners of what is fed
    rows: Feed
    filled: jax.Array  # [B] int32, entries of the answer, what is fed included
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    policy: Policy = dataclasses.field(metadata={"static": True})
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})

    sharding = None  # one device

    @property
    def state(self) -> tuple[jax.Array, jax.Array, State]:
        return self.pool.answer.k, self.pool.answer.v, self.pool.policy

    def with_state(self, state: tuple[jax.Array, jax.Array, State]) -> "Reading":
        answer = dataclasses.replace(self.pool.answer, k=state[0], v=state[1])
        return dataclasses.replace(
            self, pool=dataclasses.replace(self.pool, answer=answer, policy=state[2])
        )

    def attend(self, state, layer, q, k, v):
        rows, request = self.rows, jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
        keys, values = (
            whole.at[layer, request, rows.slots].set(new.astype(whole.dtype), mode="drop")
            for whole, new in zip(state[:2], (k, v), strict=True)
        )
        answered = pool_attention(
            q,
            keys,
            values,
            owners=self.pool.answer.owners,
            threads=rows.threads,
            joined=rows.joined,
            forks=rows.forks,
            lengths=self.filled,
            layer=layer,
            return_lse=True,
            implementation=self.implementation,
        )
        mine = {
            name: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
            for name, x in state[2].items()
        }
        with jax.named_scope("select"):
            picked, mine = self._picked(mine, layer, q)
        asked = gathered_attention(
            q,
            *self.pool.prompt[:2],
            picked.slots,
            counts=picked.counts,
            lengths=self.pool.lengths + q.shape[1],  # as if all rows came after the prompt
            layer=layer,
            return_lse=True,
            implementation=self.implementation,
        )
        held = {
            name: jax.lax.dynamic_update_index_in_dim(x, mine[name], layer, 0)
            for name, x in state[2].items()
        }
        return merge_attention([answered, asked])[0], (keys, values, held)

    def _picked(self, mine: State, layer: jax.Array, q: jax.Array) -> tuple[Read, State]:
        """What all rows of a layer read of the prompt."""
        active = self.rows.active
        weights = active / jnp.maximum(jnp.sum(active, axis=1, keepdims=True), 1)
        mean = jnp.einsum("BT,BTNH->BNH", weights, q, preferred_element_type=jnp.float32)
        lengths = self.pool.lengths
        view = View(
            self.config,
            self.pool.prompt,
            layer,
            mean[:, None].astype(q.dtype),
            jnp.maximum(lengths - 1, 0),
            jnp.any(active, axis=1).astype(jnp.int32),
            Heads.of(self.policy.head_weights, self.config.num_heads, layer),
            False,
            self.implementation,
        )
        picked, mine = self.policy.select(mine, view)
        if picked is None:
            every = jnp.arange(view.capacity, dtype=jnp.int32)[None]
            picked = Read(jnp.broadcast_to(every, (len(lengths), view.capacity)), lengths)
        return picked, mine


@dataclasses.dataclass(frozen=True)
class Selected(Composition):
    """What `policy` picks of a prompt in every step. Raises UserError for one that rotates keys
    when they are read, or goes back to dense steps."""

    policy: Policy

    def __post_init__(self) -> None:
        if self.policy.rope != "write" or self.policy.positions != "true":
            raise UserError("threads stand at several positions: keys must keep their true ones")
        if self.policy.guard is not None:
            raise UserError("dense steps beside a selection are not made for threads")

    def ahead(self, program: Program, params: Any, tokens: Any, lengths: Any) -> tuple[Any, ...]:
        self.policy.check(program.model, program.sharding, None)
        more = -tokens.shape[1] % self.policy.chunk
        return np.pad(np.asarray(tokens), ((0, 0), (0, more))), lengths

    def prefill(self, program, params, tokens, lengths):
        model, (B, P) = program.model, tokens.shape
        slots = -(-(P + program.rules.rows) // _MULTIPLE) * _MULTIPLE
        static = long_context.Program(
            model,
            SamplingConfig(temperature=0.0),
            self.policy,
            slots,
            implementation=program.implementation,
            valid_vocab=program.valid_vocab,
        )
        logits, held = chunk_major.prefill(static, params, tokens, lengths, None)
        room = -(-program.rules.room // _MULTIPLE) * _MULTIPLE
        shape = (model.num_layers, B, room, model.num_kv_heads, model.head_dim)
        empty = (jnp.zeros(shape, model.dtype) for _ in range(2))
        answer = Pool(*empty, jnp.zeros((B, room), jnp.int32))
        return logits, Apart(held.buffers, held.policy, lengths, answer), jnp.zeros_like(lengths)

    def forward(self, program: Program, params: transformer.Params) -> Forward:
        def forward(fed: Feed, filled: jax.Array, held: Apart) -> tuple[jax.Array, Apart]:
            return logits(program, self.policy, params, fed, filled, held)

        return forward


def logits(
    program: Program,
    policy: Policy,
    params: transformer.Params,
    rows: Feed,
    filled: jax.Array,  # [B] int32
    held: Apart,
) -> tuple[jax.Array, Apart]:
    """As `pool.logits`."""
    request = jnp.arange(rows.slots.shape[0], dtype=jnp.int32)[:, None]
    owners = held.answer.owners.at[request, rows.slots].set(rows.threads, mode="drop")
    held = dataclasses.replace(held, answer=dataclasses.replace(held.answer, owners=owners))
    context = Reading(held, rows, filled, program.model, policy, program.implementation)
    states, context = transformer.hidden(
        program.model, params, rows.tokens, rows.positions, context
    )
    return transformer.logits(program.model, params, states), context.pool
