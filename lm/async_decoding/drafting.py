# SPDX-License-Identifier: Apache-2.0
"""Drafts inside every thread: a step feeds each thread's token and n more that may follow it, and
keeps those that the model draws itself. So a step writes up to n + 1 tokens of every thread, and
what comes out is what the decoder writes without drafts, token for token and draw for draw: a draft
is kept as far as it equals the draws of the same keys, greedy or not. Two things remain, as for
`decode`: `max_tokens` cuts whoever is writing then, and products of other shapes round differently.

A draft ends with the first token that is not text (a tag, or an end), since that may change who
is there and who sees whom; with a block's cap; and while a thread's opening or end is forced.
What a step feeds is attended to apart from the pool: among themselves, the tokens of a thread are
a chain. Only then are the keys and values of the kept ones written, so that the pool has no gaps
and holds what it would hold without drafts.

A drafter is handed in as a function of the model's state before a thread's token, and that token
(`Proposer`). The first draft of a thread is made from nothing or from what its row held before, and
is kept or not like any other.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lm import contexts, transformer
from lm.async_decoding import tables, threads
from lm.async_decoding.composed import Composition
from lm.async_decoding.decode import Choose, Loop, Program
from lm.async_decoding.pool import Pool
from lm.async_decoding.tables import Tables
from lm.async_decoding.threads import IDLE, NEVER, State
from lm.transformer import Params
from ops.merge_attention import merge_attention
from ops.pool_attention import pool_attention


class Proposer(Protocol):
    """Static and hashable; its weights are passed beside it."""

    @property
    def length(self) -> int:
        """n, at least 1."""

    def __call__(
        self,
        params: Params,
        weights: Any,
        states: jax.Array,  # [R, D], final-norm states, each before a token
        last: jax.Array,  # [R] int32, that token
    ) -> jax.Array:
        """Tokens [R, n] int32 that may follow."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """What is kept between steps."""

    pool: Pool
    states: jax.Array  # [B, M, D], of the last token of each row that is in the pool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fed:
    """What a step feeds: of each row its token and its draft, [B, M, 1 + n] each."""

    tokens: jax.Array  # int32
    positions: jax.Array  # int32
    threads: jax.Array  # int32; `IDLE` where nothing is fed
    joined: jax.Array  # int32, of the row
    forks: jax.Array  # int32, of the row

    def flat(self, name: str) -> jax.Array:
        """[B, M (1 + n)]."""
        found = getattr(self, name)
        return found.reshape(found.shape[0], -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chains(contexts.Sharded):
    """R = M (1 + n) tokens that attend to a pool without them, and to each other."""

    new: tuple[jax.Array, jax.Array]  # keys and values [L, B, R, K, H] of what is fed
    pool: Pool
    fed: Fed
    filled: jax.Array  # [B] int32, entries of the pool
    sees: jax.Array  # [B, R, R] bool: who of those that are fed sees whom
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})

    sharding = None  # one device

    @property
    def state(self) -> tuple[jax.Array, jax.Array]:
        return self.new

    def with_state(self, state: tuple[jax.Array, jax.Array]) -> "Chains":
        return dataclasses.replace(self, new=state)

    def attend(self, state, layer, q, k, v):
        k, v = (x.astype(whole.dtype) for x, whole in zip((k, v), state, strict=True))
        before = pool_attention(
            q,
            self.pool.k,
            self.pool.v,
            owners=self.pool.owners,
            threads=self.fed.flat("threads"),
            joined=self.fed.flat("joined"),
            forks=self.fed.flat("forks"),
            lengths=self.filled,
            layer=layer,
            return_lse=True,
            implementation=self.implementation,
        )
        out, _ = merge_attention([before, _among(q, k, v, self.sees)])
        new = tuple(
            jax.lax.dynamic_update_index_in_dim(whole, x, layer, 0)
            for whole, x in zip(state, (k, v), strict=True)
        )
        return out, new


def _among(
    q: jax.Array,  # [B, R, N, H]
    k: jax.Array,  # [B, R, K, H]
    v: jax.Array,  # [B, R, K, H]
    sees: jax.Array,  # [B, R, R] bool
) -> tuple[jax.Array, jax.Array]:
    """Attention of a few tokens to each other, and its log-sum-exp [B, R, N]: R is small, and what
    is fed lies in no cache yet."""
    B, R, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, R, K, N // K, H)
    scores = jnp.einsum("BRKGH,BSKH->BKGRS", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(sees[:, None, None], scores * H**-0.5, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    shares = jnp.exp(scores - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])
    out = jnp.einsum("BKGRS,BSKH->BRKGH", shares, v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype), jnp.moveaxis(lse, 3, 1).reshape(B, R, N)


@dataclasses.dataclass(frozen=True)
class Drafting(Composition):
    """Every thread drafts by `proposer`."""

    proposer: Proposer

    def prefill(self, program, params, *arguments):
        logits, filled, slots = super().prefill(program, params, *arguments)
        shape = (len(logits), program.rules.rows, program.model.embed_dim)
        return logits, Held(filled, jnp.zeros(shape, program.model.dtype)), slots

    def step(self, program, params, weights, known, state, choose):
        return step(program, self.proposer, params, weights, known, state, choose)[0]


def step(
    program: Program,
    proposer: Proposer,
    params: Params,
    weights: Any,
    known: Tables,
    state: Loop,
    choose: Choose,
) -> tuple[Loop, tuple[Fed, jax.Array, jax.Array]]:
    """Up to n + 1 tokens further in every active thread; also what was fed, how many tokens [B, M]
    of each row were kept of it, and the logits [B, M, 1 + n, V] after each."""
    before, held = state.threads, state.pool
    B, M = before.rows.thread.shape
    with jax.named_scope("draft"):
        rows = held.states.reshape(B * M, -1)
        drafts = proposer(params, weights, rows, before.rows.token.reshape(-1))
    fed = _fed(before, drafts.reshape(B, M, -1))
    states, new = _forward(program, params, before, held.pool, fed)
    logits = transformer.logits(program.model, params, states)
    states, logits = (x.reshape(B, M, -1, x.shape[-1]) for x in (states, logits))
    with jax.named_scope("accept"):
        drawn = jnp.stack(
            [choose(_later(before, j), logits[:, :, j]) for j in range(logits.shape[2])], axis=-1
        )
        count = _kept(known, before, fed, drawn)
        filled, after = _written(before, held.pool, fed, new, count)
        last = jnp.maximum(count, 1)[..., None] - 1
        after = threads.lead(program.rules, known, after, drawn[..., :-1], last[..., 0])
        final = jnp.take_along_axis(drawn, last, axis=2)[..., 0]
        after = threads.accept(program.rules, known, after, final, count > 0)
        own = jnp.take_along_axis(states, last[..., None], axis=2)[:, :, 0]
        own = jnp.where((count > 0)[..., None], own, held.states)
    loop = dataclasses.replace(state, pool=Held(filled, own), threads=threads.stepped(after))
    return loop, (fed, count, logits)


def _fed(before: State, drafts: jax.Array) -> Fed:
    """What to feed of drafts [B, M, n]."""
    rows, n = before.rows, drafts.shape[-1]
    active = rows.active & ~before.done[:, None]
    speaks = active & ~rows.closing & (rows.fed + 1 >= rows.opening)
    place = jnp.arange(1 + n, dtype=jnp.int32)[None, None]
    real = active[..., None] & ((place == 0) | speaks[..., None])
    # what follows the end of a promise leaves its reservation free
    free = jnp.zeros_like(rows.position).at[:, 0].set(before.main.reserved)
    positions = rows.position[..., None] + jnp.where(place > 0, place + free[..., None], 0)
    tokens = jnp.concatenate([rows.token[..., None], drafts.astype(jnp.int32)], axis=-1)
    return Fed(
        tokens=jnp.where(real, tokens, 0),
        positions=jnp.where(real, positions, 0),
        threads=jnp.where(real, rows.thread[..., None], IDLE),
        joined=jnp.where(real, rows.joined[..., None], IDLE),
        forks=jnp.where(real, rows.fork[..., None], 0),
    )


def _sees(before: State, fed: Fed) -> jax.Array:
    """[B, R, R]: a token sees those of its own thread up to itself, and of other threads what is
    fed beside it and is no draft, by the rule of the pool."""
    owners, n = fed.flat("threads"), fed.tokens.shape[2]
    R = owners.shape[1]
    place = jnp.arange(R, dtype=jnp.int32)
    own = (owners[:, :, None] == owners[:, None]) & (place[None] <= place[:, None])[None]
    real = owners > IDLE
    first = real & (place % n == 0)[None]
    slots = before.slots[:, None] + jnp.cumsum(first, axis=1, dtype=jnp.int32) - 1
    joined, forks = fed.flat("joined")[:, :, None], fed.flat("forks")[:, :, None]
    others = (owners[:, None] <= joined) & (slots[:, None] < forks) & first[:, None]
    others = others & (owners[:, :, None] != owners[:, None])
    return (own | others) & real[:, :, None] & real[:, None]


def _forward(program: Program, params: Params, before: State, pool: Pool, fed: Fed):
    """States [B, R, D], and keys and values [L, B, R, K, H] of what is fed."""
    L, B, _, K, H = pool.k.shape
    R = fed.tokens.shape[1] * fed.tokens.shape[2]
    empty = (jnp.zeros((L, B, R, K, H), pool.k.dtype),) * 2
    sees = _sees(before, fed)
    context = Chains(empty, pool, fed, before.slots, sees, program.implementation)
    arguments = fed.flat("tokens"), fed.flat("positions"), context
    states, context = transformer.hidden(program.model, params, *arguments)
    return states, context.new


def _later(before: State, tokens: int) -> State:
    """As it is to what draws, so many tokens later."""
    rows = dataclasses.replace(before.rows, count=before.rows.count + tokens)
    return dataclasses.replace(before, rows=rows)


def _kept(known: Tables, before: State, fed: Fed, drawn: jax.Array) -> jax.Array:
    """How many [B, M] of the drawn tokens [B, M, 1 + n] each row takes, and how many of those that
    it fed stay: the drawn ones follow those."""
    rows = before.rows
    drafted, real = fed.tokens[..., 1:], fed.threads > IDLE
    goes_on = (drafted == drawn[..., :-1]) & real[..., 1:]
    goes_on = goes_on & (known.kinds[drawn[..., :-1]] == tables.TEXT)
    accepted = jnp.sum(jnp.cumprod(goes_on, axis=-1, dtype=jnp.int32), axis=-1)
    accepted = jnp.where(rows.opening > 0, jnp.minimum(accepted, rows.left), accepted)
    return jnp.where(real[..., 0], accepted + 1, 0)


def _written(before: State, pool: Pool, fed: Fed, new, count: jax.Array) -> tuple[Pool, State]:
    """The pool with the kept ones of what was fed, in the order of the rows, and the threads with
    room for them."""
    B, M, T = fed.tokens.shape
    kept = (jnp.arange(T, dtype=jnp.int32)[None, None] < count[..., None]).reshape(B, M * T)
    place = before.slots[:, None] + jnp.cumsum(kept, axis=1, dtype=jnp.int32) - 1
    place = jnp.where(kept, place, NEVER)
    request = jnp.arange(B, dtype=jnp.int32)[:, None]
    k, v = (
        whole.at[:, request, place].set(x, mode="drop")
        for whole, x in zip((pool.k, pool.v), new, strict=True)
    )
    owners = pool.owners.at[request, place].set(fed.flat("threads"), mode="drop")
    slots = before.slots + jnp.sum(kept, axis=1, dtype=jnp.int32)
    return Pool(k, v, owners), dataclasses.replace(before, slots=slots)
