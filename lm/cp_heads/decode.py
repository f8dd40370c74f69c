# SPDX-License-Identifier: Apache-2.0
"""Lossless decoding with drafts: one trunk call a cycle, everything in one jitted loop.

A cycle starts with a token y that has been emitted but not fed, and with the hidden state before
it. A drafter proposes what follows y; one call of the trunk on y and the drafts gives the law of
every place; what is kept of the draft is emitted together with one more token, the next y. The
cache is rolled back by its length. Sequences of a batch move on at their own pace, and what a
sequence gets does not depend on the others.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import contexts, generate, sampling, transformer
from lm.cp_heads import acceptance
from lm.cp_heads.draft import Draft
from lm.cp_heads.drafters import Drafter, Known, Target
from lm.cp_heads.tree import TreeDecode
from lm.errors import UserError
from lm.generate import Generation

Params = transformer.Params


@dataclasses.dataclass(frozen=True)
class Program:
    """All that is static in the compiled functions."""

    target: Target
    drafter: Drafter
    capacity: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The loop's state; a pytree."""

    cache: contexts.Cache
    drafter: Any
    keys: jax.Array  # [B] one key per sequence
    states: jax.Array  # [B, D] of the last token in the cache
    last: jax.Array  # [B] int32, emitted but not in the cache
    tokens: jax.Array  # [B, max_new_tokens] int32
    log_probs: jax.Array  # [B, max_new_tokens] float32
    counts: jax.Array  # [B] int32, tokens emitted before the stop token
    stopped: jax.Array  # [B] bool
    done: jax.Array  # [B] bool, nothing more to emit or not a sequence at all
    cycle: jax.Array  # [] int32
    kept: jax.Array  # [B, n + 1] int32, cycles by the number of drafted tokens that passed


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the drafts were good for, over the sequences of a call."""

    kept: np.ndarray  # [sequences, n + 1] cycles by the number of drafted tokens that passed
    tokens: np.ndarray  # [sequences] emitted, the first one (from the prompt's own call) included

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            np.concatenate([self.kept, other.kept]), np.concatenate([self.tokens, other.tokens])
        )

    def each(self) -> Iterator["Statistics"]:
        """Of every sequence by itself."""
        for index in range(len(self.tokens)):
            yield Statistics(self.kept[index : index + 1], self.tokens[index : index + 1])

    @property
    def trunk_calls(self) -> int:
        """Of all sequences, the calls on prompts not counted."""
        return int(self.kept.sum())

    def summary(self) -> dict[str, Any]:
        """`tokens_per_call` and the `acceptance` of each drafted position, given that it was
        reached; None for positions that never were.

        tokens_per_call counts what the calls would have emitted without a limit or stop token
        in their midst: it does not depend on how long the outputs are.
        """
        cycles = self.kept.sum(axis=0)
        reached = np.cumsum(cycles[::-1])[::-1]  # cycles that kept at least so many
        shares = [
            float(after / before) if before else None
            for before, after in itertools.pairwise(reached)
        ]
        calls = self.trunk_calls
        emitted = float(cycles @ np.arange(1, len(cycles) + 1))
        return {
            "trunk_calls": calls,
            "tokens": int(self.tokens.sum()),
            "tokens_per_call": emitted / calls if calls else None,
            "acceptance": shares,
        }


def decode(
    target: Target,
    params: Params,
    drafter: Drafter,
    weights: Any,
    prompts: Sequence[np.ndarray],  # int32 [n] each
    stop_ids: Sequence[int],
    key: jax.Array,
    *,
    indices: Sequence[int] | None = None,
) -> tuple[list[Generation], Statistics]:
    """Continues every prompt until a stop token or `max_new_tokens`: what `lm.generate` gives when
    greedy, and otherwise draws from the same law.

    Args:
      weights: the drafter's own, e.g. the head's parameters.
      stop_ids: end a sequence; the token that did is not part of it.
      key: sequence i draws from `fold_in(key, indices[i])`, whatever the rest of the batch is.
      indices: by default the position in `prompts`.

    Raises:
      UserError: no prompts, an empty one, or a drafter that does not fit the target.
      ops.dispatch.Unsupported: the named implementation cannot serve.
    """
    steps = stream(
        target,
        params,
        drafter,
        weights,
        prompts,
        stop_ids,
        key,
        indices=indices,
        chunk=target.sampling.max_new_tokens,
    )
    (whole,) = steps
    return whole


def stream(
    target: Target,
    params: Params,
    drafter: Drafter,
    weights: Any,
    prompts: Sequence[np.ndarray],
    stop_ids: Sequence[int],
    key: jax.Array,
    *,
    indices: Sequence[int] | None = None,
    chunk: int = 16,
) -> Iterator[tuple[list[Generation], Statistics]]:
    """`decode` in pieces of at least `chunk` tokens a sequence, with the statistics so far.

    Concatenated, the pieces are what `decode` returns; `stopped` is set in the piece that ends a
    sequence. Raises as `decode` does, at the first piece.
    """
    if chunk < 1:
        raise UserError(f"chunk={chunk} must be at least 1")
    program, arguments, stops = request(target, drafter, prompts, stop_ids, key, indices)
    params, weights = prepare(target, params), prepare(target, weights)
    state = prefill(program, params, weights, *arguments, stops)
    seen = np.zeros(len(prompts), np.int32)
    most = target.sampling.max_new_tokens
    for limit in range(chunk, most + chunk, chunk):
        state = advance(program, params, weights, state, stops, min(limit, most), most)
        piece, seen, finished = generate.collect(state, seen)
        yield piece, statistics(state, len(prompts))
        if finished:
            return


def prepare(target: Target, params: Any) -> Any:
    """Floating parameters in the compute dtype, and the layers of a transformer by themselves; what
    is so already is shared."""

    def cast(x):
        return jnp.asarray(x, target.model.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    params = jax.tree.map(cast, params)
    whole = isinstance(params, dict) and "layers" in params
    return transformer.unstacked(params) if whole else params


def request(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[np.ndarray],
    stop_ids: Sequence[int],
    key: jax.Array,
    indices: Sequence[int] | None = None,
) -> tuple[Program, tuple[Any, ...], np.ndarray]:
    """The program, the padded arguments of `prefill`, and the padded stop tokens.

    Raises UserError as `decode` does.
    """
    drafter.check(target)
    size = generate.bucket(max(generate.prompt_lengths(prompts)))
    # a finished sequence stands still, and is still fed with a draft
    room = size + target.sampling.max_new_tokens + drafter.length + 1
    padded = generate.pad(prompts, indices, size, target.sharding)
    program = Program(target, drafter, -(-room // 64) * 64)
    return program, (*padded, key), generate.pad_stops(stop_ids)


def statistics(state: State, count: int) -> Statistics:
    """Of the first `count` sequences, on the host."""
    kept, tokens = jax.device_get((state.kept, state.counts))
    return Statistics(kept[:count], tokens[:count])


@functools.partial(jax.jit, static_argnums=0)
def prefill(
    program: Program,
    params: Params,
    weights: Any,
    tokens: jax.Array,  # [B, T] int32, padded on the right
    lengths: jax.Array,  # [B] int32; 0: no sequence, only padding of the batch
    indices: jax.Array,  # [B] int32
    key: jax.Array,  # []
    stop_ids: jax.Array,  # [stops] int32
) -> State:
    """Fills the caches and emits the first token of every sequence."""
    target, drafter = program.target, program.drafter
    B, new = tokens.shape[0], target.sampling.max_new_tokens
    states, cache = prefill_states(target, params, tokens, lengths, program.capacity)
    state = State(
        cache=cache,
        drafter=drafter.start(target, weights, tokens, lengths, program.capacity),
        keys=jax.vmap(lambda index: jax.random.fold_in(key, index))(indices),
        states=states,
        last=jnp.zeros(B, jnp.int32),
        tokens=jnp.zeros((B, new), jnp.int32),
        log_probs=jnp.zeros((B, new), jnp.float32),
        counts=jnp.zeros(B, jnp.int32),
        stopped=jnp.zeros(B, bool),
        done=lengths == 0,
        cycle=jnp.zeros((), jnp.int32),
        kept=jnp.zeros((B, drafter.length + 1), jnp.int32),
    )
    logits = logits_of(target, params, states)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, 0)
    first = sampling.sample(logits, target.sampling, keys)
    log_probs = _log_probs(logits[:, None], first[:, None])
    return _placed(_filed(state, first[:, None], jnp.ones_like(first), log_probs, stop_ids), target)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def advance(
    program: Program,
    params: Params,
    weights: Any,
    state: State,
    stop_ids: jax.Array,
    tokens: jax.Array,  # []
    cycles: jax.Array,  # []
) -> State:
    """Goes on until every sequence is done or has `tokens` tokens, for at most `cycles` cycles."""
    first = state.cycle

    def unfinished(state: State) -> jax.Array:
        wanting = ~state.done & (state.counts < tokens)
        return jnp.any(wanting) & (state.cycle - first < cycles)

    def cycle(state: State) -> State:
        proposed, held = propose(program, params, weights, state)
        return verify(program, params, dataclasses.replace(state, drafter=held), proposed, stop_ids)

    return jax.lax.while_loop(unfinished, cycle, state)


def propose(program: Program, params: Params, weights: Any, state: State) -> tuple[Draft, Any]:
    """The drafter's half of a cycle: what it proposes, and its state."""
    known = Known(state.states, state.last, state.cache.lengths)
    keys = _cycle_keys(state, 0)
    with jax.named_scope("draft"):
        return program.drafter.draft(program.target, params, weights, state.drafter, known, keys)


def verify(
    program: Program, params: Params, state: State, proposed: Draft, stop_ids: jax.Array
) -> State:
    """The target's half of a cycle: one trunk call, what is kept, and the token after it."""
    target, drafter = program.target, program.drafter
    n = drafter.length
    known = Known(state.states, state.last, state.cache.lengths)
    with jax.named_scope("trunk"):
        states, context = trunk(target, params, state.cache, state.last, proposed.tokens)
        logits = logits_of(target, params, states)  # [B, T, V]
    with jax.named_scope("accept"):
        accepted, leader, token = judge(target, proposed, logits, _cycle_keys(state, 1))
        depths = jnp.broadcast_to(jnp.arange(n + 1, dtype=jnp.int32)[None], (len(accepted), n + 1))
        rows = acceptance.path_rows(leader, depths, n)
        drafted = jnp.take_along_axis(proposed.tokens, leader[:, None, None], axis=1)[:, 0]
        padded = jnp.pad(drafted, ((0, 0), (0, 1)))
        emitted = jnp.where(depths < accepted[:, None], padded, token[:, None])
        own = jnp.take_along_axis(logits, rows[..., None], axis=1)  # [B, n + 1, V]
        end = jnp.take_along_axis(rows, accepted[:, None], axis=1)
        after = jnp.take_along_axis(states, end[..., None], axis=1)[:, 0]
    count = jnp.where(state.done, 0, accepted + 1)
    if isinstance(context, TreeDecode):
        cache = context.committed(rows, count)
    else:
        cache = context.advanced(count)
    new = dataclasses.replace(
        state,
        cache=cache,
        drafter=drafter.keep(state.drafter, known, drafted, count),
        states=after,
        cycle=state.cycle + 1,
        kept=state.kept + ((depths == accepted[:, None]) & ~state.done[:, None]),
    )
    return _placed(_filed(new, emitted, accepted + 1, _log_probs(own, emitted), stop_ids), target)


def prefill_states(
    target: Target,
    params: Params,
    tokens: jax.Array,  # [B, T] int32, padded on the right
    lengths: jax.Array,  # [B] int32
    capacity: int,
) -> tuple[jax.Array, contexts.Cache]:
    """Final-norm states [B, D] of the last token of every prompt, and the filled cache."""
    B, T = tokens.shape
    cache = contexts.Cache.empty(target.model, B, capacity)
    context = contexts.Prefill(cache, lengths, target.sharding, target.implementation)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    states, context = transformer.hidden(target.model, params, tokens, positions, context)
    rows = jnp.maximum(lengths, 1) - 1
    return jnp.take_along_axis(states, rows[:, None, None], axis=1)[:, 0], context.cache


def trunk(
    target: Target,
    params: Params,
    cache: contexts.Cache,
    last: jax.Array,  # [B] int32
    drafts: jax.Array,  # [B, C, n] int32
) -> tuple[jax.Array, Any]:
    """Final-norm states [B, 1 + C n, D] after the last token and after each drafted one, and the
    context, which makes the new cache."""
    B, C, n = drafts.shape
    execution = (target.sharding, target.implementation)
    tokens = jnp.concatenate([last[:, None], drafts.reshape(B, C * n)], axis=1)
    if C == 1:
        context = contexts.Decode(cache, *execution)
        depths = jnp.arange(1 + n, dtype=jnp.int32)
    else:
        context = TreeDecode.empty(cache, C, n, *execution)
        depths = context.depths
    positions = cache.lengths[:, None] + depths[None]
    return transformer.hidden(target.model, params, tokens, positions, context)


def judge(
    target: Target,
    proposed: Draft,
    logits: jax.Array,  # [B, 1 + C n, V] float32, -inf on padding of the vocabulary
    keys: jax.Array,  # [B] keys
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens kept, the chain that they are of, the token after them), [B] int32 each."""
    tokens = proposed.tokens
    chains, n = tokens.shape[1:]
    if sampling.is_greedy(target.sampling):
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if chains > 1:
            return acceptance.tree_greedy(tokens, best)
        accepted, token = acceptance.chain_greedy(tokens[:, 0], best)
        return accepted, jnp.zeros_like(accepted), token

    def numbers(key):
        return jax.random.uniform(jax.random.fold_in(key, 0), (chains, n))

    verdict = verdict_of(target, proposed, logits, jax.vmap(numbers)(keys))

    def draw(key, law):
        return jax.random.categorical(jax.random.fold_in(key, 1), law)

    token = jax.vmap(draw)(keys, verdict.log_next).astype(jnp.int32)
    return verdict.accepted, verdict.chain, token


def verdict_of(
    target: Target, proposed: Draft, logits: jax.Array, uniforms: jax.Array
) -> acceptance.Verdict:
    """What is kept when these numbers [B, C, n] are drawn; the model's law is filtered as the
    drafts' was."""
    log_p = sampling.log_probs(logits, target.sampling)
    if proposed.tokens.shape[1] > 1:
        return acceptance.tree(proposed.tokens, proposed.log_q, log_p, uniforms)
    return acceptance.chain(proposed.tokens[:, 0], proposed.log_q[:, 0], log_p, uniforms[:, 0])


def logits_of(target: Target, params: Params, states: jax.Array) -> jax.Array:
    """Float32 logits [..., V], -inf on padding of the vocabulary."""
    logits = transformer.logits(target.model, params, states)
    return sampling.masked_logits(logits, target.valid_vocab)


def _log_probs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log-softmax of logits [B, T, V] at tokens [B, T]."""
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return own - jax.nn.logsumexp(logits, axis=-1)


def _cycle_keys(state: State, purpose: int) -> jax.Array:
    """A key per sequence for one purpose of this cycle; number 0 drew the first token."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(
        state.keys, 1 + 2 * state.cycle + purpose
    )


def _filed(
    state: State,
    emitted: jax.Array,  # [B, W] int32
    count: jax.Array,  # [B] int32, how many of them are valid, at least 1
    log_probs: jax.Array,  # [B, W] float32
    stop_ids: jax.Array,  # [stops] int32
) -> State:
    """Appends tokens up to the first stop token or the last place."""
    B, W = emitted.shape
    most = state.tokens.shape[1]
    places = jnp.arange(W, dtype=jnp.int32)[None]
    room = most - state.counts
    within = (places < jnp.minimum(count, room)[:, None]) & ~state.done[:, None]
    stops = jnp.any(emitted[..., None] == stop_ids[None, None], axis=-1) & within
    ended = jnp.any(stops, axis=1)
    before = jnp.where(ended, jnp.argmax(stops, axis=1), W).astype(jnp.int32)
    keep = within & (places < before[:, None])
    columns = jnp.where(keep, state.counts[:, None] + places, most)  # beyond the end: dropped
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    counts = state.counts + jnp.sum(keep, axis=1, dtype=jnp.int32)
    final = jnp.take_along_axis(emitted, count[:, None] - 1, axis=1)[:, 0]
    return dataclasses.replace(
        state,
        last=jnp.where(state.done, state.last, final),
        tokens=state.tokens.at[rows, columns].set(emitted, mode="drop"),
        log_probs=state.log_probs.at[rows, columns].set(log_probs, mode="drop"),
        counts=counts,
        stopped=state.stopped | ended,
        done=state.done | ended | (counts >= most),
    )


def _placed(state: State, target: Target) -> State:
    """The cache split over sequences and heads; the rest whole everywhere, for any host to read."""
    sharding = target.sharding
    if sharding is None:
        return state
    cache = dataclasses.replace(
        state.cache,
        k=sharding.constrain(state.cache.k, None, "batch", None, "kv_heads", None),
        v=sharding.constrain(state.cache.v, None, "batch", None, "kv_heads", None),
    )
    whole = {
        name: sharding.constrain(getattr(state, name), *[None] * getattr(state, name).ndim)
        for name in ("tokens", "log_probs", "counts", "stopped", "done", "kept")
    }
    return dataclasses.replace(state, cache=cache, **whole)
