# SPDX-License-Identifier: Apache-2.0
"""Drafted tokens verified instead of thrown away: the target emits as many of them at once as it
would have drawn itself.

SpecKV feeds the last token of a prompt again when the rest has been dropped; here the drafted
tokens are fed behind it, in the same pass. Row i's draw is made with the key of draw number i, as
plain decoding makes it, and holds while it is the drafted token: the first that is not is emitted
in its place. Then the draft, whose cache is cut back to what holds, goes on from there and drafts
the next block, until every sequence is done. So the text is that of plain decoding under the same
keys, at any temperature, and its law is the target's, whatever the draft: only how many passes the
target makes depends on it. (To accept more often when tokens are drawn, draws would have to be
coupled to the draft's probabilities: then keys no longer give the same text.)
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import contexts, generate, sampling, transformer
from lm.config import ModelConfig, SamplingConfig, require_at_least_zero
from lm.draft_inference import draft
from lm.draft_inference.method import Drafted
from lm.errors import UserError
from lm.generate import Generation
from lm.long_context import decode
from lm.long_context.eviction import layer_major
from lm.long_context.program import Held, Program, Request
from lm.progress import say
from lm.sharding import Sharding


class State(NamedTuple):
    """The loop's state: sequences may have drawn different numbers of tokens."""

    held: Held
    starts: jax.Array  # [B] int32: the position of `last`
    keys: jax.Array  # [B] keys
    last: jax.Array  # [B] int32, drawn but not yet in the cache
    tokens: jax.Array  # [B, max_new_tokens] int32
    log_probs: jax.Array  # [B, max_new_tokens] float32
    counts: jax.Array  # [B] int32
    stopped: jax.Array  # [B] bool
    done: jax.Array  # [B] bool


@dataclasses.dataclass(frozen=True)
class Verified:
    """How drafts did; on the host."""

    drafted: np.ndarray  # [B] int32: tokens that were drafted
    accepted: np.ndarray  # [B] int32: those that the target would have drawn
    steps: int  # passes of the target after the first, of the whole batch


@dataclasses.dataclass(frozen=True)
class _Block:
    """All that is static in the loop over blocks."""

    program: Program
    model: ModelConfig | None  # of the draft
    valid_vocab: int | None
    tokens: int  # drafted at most; 0: none, and every pass is a plain step


def generations(
    model: ModelConfig,
    params: decode.Params,
    prompts: Sequence[np.ndarray],
    settings: SamplingConfig,
    method: Drafted,
    stop_ids: Sequence[int],
    key: jax.Array,
    *,
    block: int = 4,
    sharding: Sharding | None = None,
    implementation: str | None = None,
    valid_vocab: int | None = None,
    capacity: int | None = None,
    indices: Sequence[int] | None = None,
) -> tuple[list[Generation], Verified]:
    """What `decode.decode` gives with this method, and how many drafted tokens it was spared.

    block: tokens that are drafted for every pass after the first, which verifies those that the
      method drafts anyway; 0: none. A drafter that cannot go on (LAQ++, heads) says so.

    Raises UserError as that does, and for a method whose drafted tokens do not vote in the target.
    """
    if not method.votes:
        raise UserError("only tokens that follow a prompt in the target can be verified")
    new = settings.max_new_tokens
    if method.tokens(settings) > new:
        raise UserError(
            f"{method.tokens(settings)} drafted tokens are more than the {new} that are generated"
        )
    require_at_least_zero("block", block)
    program = Program(model, settings, method, 0, sharding, implementation, valid_vocab)
    program, request = decode.request(program, prompts, stop_ids, key, capacity, indices)
    params = generate.prepare(model, params)
    writer = method.drafter.writer(program, params) if block else None
    room = 0 if writer is None else new + block + 1
    if block and writer is None:
        say("what drafts here drafts once: its tokens are verified, later passes draw one each")
    found = method.look(program, params, request, room)
    seen = found.lookahead
    state, accepted = first(program, params, found.request, seen.tokens, seen.counts)
    drafted = jnp.minimum(seen.counts, program.policy.extra)
    about = (None, None, 0) if writer is None else (writer.model, writer.valid_vocab, block)
    static = _Block(decode.stepping(program), *about)
    state, *counted = advance(
        static,
        params,
        None if writer is None else writer.params,
        state,
        seen.cache,
        jnp.asarray(request.lengths),
        request.stop_ids,
        drafted,
        accepted,
    )
    count = len(prompts)
    piece, _, _ = generate.collect(state, np.zeros(count, np.int32))
    drafted, accepted, steps = jax.device_get(counted)
    return piece, Verified(drafted[:count], accepted[:count], int(steps))


@functools.partial(jax.jit, static_argnums=0)
def first(
    program: Program,
    params: decode.Params,
    request: Request,
    drafted: jax.Array,  # [B, L] int32
    counts: jax.Array,  # [B] int32
) -> tuple[State, jax.Array]:
    """The prefill, the last token and the drafted ones behind it; and how many of those hold."""
    tokens, lengths = request.tokens, request.lengths
    B, E = len(lengths), program.policy.extra
    drafted, counts = drafted[:, :E], jnp.minimum(counts, E)
    _, held, places = layer_major.evicted(
        program, params, tokens, lengths, request.rows, request.places
    )
    last = jnp.maximum(lengths, 1)[:, None] - 1
    token, place = (jnp.take_along_axis(x, last, axis=1) for x in (tokens, places))
    number = jnp.arange(E + 1, dtype=jnp.int32)[None]
    fed = jnp.concatenate([token, drafted], axis=1)
    real = lengths > 0
    rows = jnp.where(real, 1 + counts, 0)
    states, held = layer_major.again(program, params, held, fed, place + number, rows)
    keys = jax.vmap(lambda index: jax.random.fold_in(request.key, index))(request.indices)
    found = _judged(
        program, keys, states, params, jnp.zeros(B, jnp.int32), drafted, counts, request.stop_ids
    )
    drawn, log_probs, accepted, ended = found
    accepted = jnp.where(real, accepted, 0)
    stopped = real & ended
    emitted = jnp.where(real, accepted + ~stopped, 0)
    mine = number < emitted[:, None]
    new = program.sampling.max_new_tokens
    pad = ((0, 0), (0, max(new - E - 1, 0)))
    held = held._replace(buffers=held.buffers.cut(rows - jnp.where(real, 1 + accepted, 0)))
    state = State(
        held,
        place[:, 0] + accepted + 1,
        keys,
        jnp.take_along_axis(drawn, accepted[:, None], axis=1)[:, 0],
        jnp.pad(jnp.where(mine, drawn, 0), pad)[:, :new],
        jnp.pad(jnp.where(mine, log_probs, 0.0), pad)[:, :new],
        emitted,
        stopped,
        stopped | ~real | (emitted >= new),
    )
    return state, accepted


def _judged(
    program: Program,
    keys: jax.Array,  # [B] keys
    states: jax.Array,  # [B, 1 + L, D], of the last token and the drafted ones
    params: decode.Params,
    numbers: jax.Array,  # [B] int32: of the first draw
    drafted: jax.Array,  # [B, L] int32
    counts: jax.Array,  # [B] int32: how many of them are
    stop_ids: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws [B, 1 + L] with their log-probabilities; how many drafted tokens hold [B], fewer than
    are still to be generated; and whether the draw after those ends the text [B]."""
    L = drafted.shape[1]
    number = jnp.arange(1 + L, dtype=jnp.int32)
    logits = transformer.logits(program.model, params, states)  # [B, 1 + L, V]
    drawn, log_probs = jax.lax.map(
        lambda row: _draw(program, keys, row[0], numbers + row[1]),
        (jnp.swapaxes(logits, 0, 1), number),
    )
    drawn, log_probs = drawn.T, log_probs.T
    ends = _any(drawn, stop_ids)
    same = (drawn[:, :L] == drafted) & (number[None, :L] < counts[:, None]) & ~ends[:, :L]
    accepted = jnp.sum(jnp.cumprod(same, axis=1, dtype=jnp.int32), axis=1)
    accepted = jnp.minimum(accepted, program.sampling.max_new_tokens - 1 - numbers)
    return drawn, log_probs, accepted, jnp.take_along_axis(ends, accepted[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def advance(
    static: _Block,
    params: decode.Params,
    writer: decode.Params | None,
    state: State,
    cache: contexts.Cache | None,  # of the draft
    lengths: jax.Array,  # [B] int32: of the prompts, as the draft read them
    stop_ids: jax.Array,
    drafted: jax.Array,  # [B] int32, so far
    accepted: jax.Array,  # [B] int32, so far
) -> tuple[State, jax.Array, jax.Array, jax.Array]:
    """Goes on, block by block, until every sequence is done: the state, tokens drafted and accepted
    in all [B], and passes of the target []."""
    if static.tokens:
        writer = draft.first_layers(static.model, writer)

    def going(carry):
        return ~jnp.all(carry[0].done)

    def block(carry):
        state, cache, drafted, accepted, steps = carry
        # the draft knows what was emitted, but for what it drew in vain
        if static.tokens:
            known = jnp.minimum(cache.lengths, lengths + state.counts - 1)
            cache = dataclasses.replace(cache, lengths=known)
        cache, new, counts = _drafted(static, writer, state, cache, lengths)
        state, held = _verified(static.program, params, state, new, counts, stop_ids)
        return state, cache, drafted + counts, accepted + held, steps + 1

    carry = state, cache, drafted, accepted, jnp.zeros((), jnp.int32)
    state, _, drafted, accepted, steps = jax.lax.while_loop(going, block, carry)
    return state, drafted, accepted, steps


def _drafted(
    static: _Block,
    writer: decode.Params | None,
    state: State,
    cache: contexts.Cache | None,
    lengths: jax.Array,
) -> tuple[contexts.Cache | None, jax.Array, jax.Array]:
    """The draft's cache, the tokens [B, L] that it says come next, and how many those are [B]."""
    B, new, L = len(state.counts), static.program.sampling.max_new_tokens, static.tokens
    if not L:
        return cache, jnp.zeros((B, 0), jnp.int32), jnp.zeros(B, jnp.int32)
    # one fewer than are still to be generated: the draw after them is a token, too
    wanted = state.counts + jnp.where(state.done, 0, jnp.minimum(L, new - 1 - state.counts))
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, draft.OWN)
    rows = jnp.arange(B)

    def step(_, carry):
        cache, text, known = carry
        # the next token that it does not know: emitted, or its own
        place = cache.lengths - lengths
        fed = ~state.done & (place < known)
        token = jnp.take_along_axis(text, place[:, None].clip(0), axis=1)
        context = contexts.Decode(cache, static.program.sharding, static.program.implementation)
        states, context = transformer.hidden(
            static.model, writer, token, cache.lengths[:, None], context
        )
        logits = transformer.logits(static.model, writer, states[:, 0])
        number = jax.vmap(jax.random.fold_in)(keys, known)
        drawn = sampling.sample(logits, static.program.sampling, number, static.valid_vocab)
        more = fed & (place == known - 1) & (known < wanted)
        text = text.at[rows, jnp.where(more, known, new + L)].set(drawn, mode="drop")
        return context.advanced(fed.astype(jnp.int32)), text, known + more

    text = jnp.pad(state.tokens, ((0, 0), (0, L)))
    # one more than it drafts, since it may not know the last two tokens that were emitted
    carry = jax.lax.fori_loop(0, L + 1, step, (cache, text, state.counts))
    cache, text, known = carry
    places = state.counts[:, None] + jnp.arange(L, dtype=jnp.int32)[None]
    return cache, jnp.take_along_axis(text, places, axis=1), known - state.counts


def _verified(
    program: Program,
    params: decode.Params,
    state: State,
    drafted: jax.Array,  # [B, L] int32
    counts: jax.Array,  # [B] int32
    stop_ids: jax.Array,
) -> tuple[State, jax.Array]:
    """The state after one pass of the target over the last token and the drafted ones, and how many
    of those held [B]."""
    active, new = ~state.done, program.sampling.max_new_tokens
    number = jnp.arange(1 + drafted.shape[1], dtype=jnp.int32)[None]
    fed = jnp.concatenate([state.last[:, None], drafted], axis=1)
    rows = jnp.where(active, 1 + counts, 0)
    places = state.starts[:, None] + number
    states, held = layer_major.again(program, params, state.held, fed, places, rows)
    found = _judged(program, state.keys, states, params, state.counts, drafted, counts, stop_ids)
    drawn, log_probs, accepted, ended = found
    accepted = jnp.where(active, accepted, 0)
    stopped = active & ended
    emitted = jnp.where(active, accepted + ~stopped, 0)
    mine = number < emitted[:, None]
    column = jnp.where(mine, state.counts[:, None] + number, new)
    place = (jnp.arange(len(active))[:, None], column)
    total = state.counts + emitted
    after = jnp.take_along_axis(drawn, accepted[:, None], axis=1)[:, 0]
    made = State(
        held._replace(buffers=held.buffers.cut(rows - jnp.where(active, 1 + accepted, 0))),
        state.starts + jnp.where(active, 1 + accepted, 0),
        state.keys,
        jnp.where(active & ~stopped, after, state.last),
        state.tokens.at[place].set(drawn, mode="drop"),
        state.log_probs.at[place].set(log_probs, mode="drop"),
        total,
        state.stopped | stopped,
        state.done | stopped | (total >= new),
    )
    return made, accepted


def _draw(program: Program, keys, logits, numbers):
    """Tokens [B] and their log-probabilities under the model, of draws number `numbers` [B]."""
    keys = jax.vmap(jax.random.fold_in)(keys, numbers)
    token = sampling.sample(logits, program.sampling, keys, program.valid_vocab)
    plain = jax.nn.log_softmax(sampling.masked_logits(logits, program.valid_vocab), axis=-1)
    return token, jnp.take_along_axis(plain, token[:, None], axis=1)[:, 0]


def _any(tokens: jax.Array, stop_ids: jax.Array) -> jax.Array:
    """Which tokens are stop tokens."""
    stops = jnp.asarray(stop_ids).reshape((1,) * tokens.ndim + (-1,))
    return jnp.any(tokens[..., None] == stops, axis=-1)
