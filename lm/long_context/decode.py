# SPDX-License-Identifier: Apache-2.0
"""Generation under a policy: prefill, then one jitted `lax.while_loop`, whatever the method.

    for piece, statistics in decode.stream(
        model, params, prompts, sampling, TokenSelect(select_config), stop_ids, key
    ):
        ...

There are two kinds of methods. A `Policy` (`lm.long_context.policy` says how to write one) reads
less: the cache holds everything, and every step picks. An `Evictor`
(`lm.long_context.eviction.evictor`) keeps less: what it drops at the end of the prompt is gone.
`chunk_major` and `eviction.layer_major` fill the cache for the one and the other, and make the
context of a step; the loop owns the rest: ragged batches, draws as in `lm.generate` (the dense
policy gives its tokens), stop tokens, streaming, the guard. `prefill`, `advance` and `step_logits`
are the compiled pieces for those who measure or explain; `request` makes their arguments.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import generate, sampling, transformer
from lm.config import ModelConfig, SamplingConfig
from lm.errors import UserError
from lm.generate import Generation, Timing
from lm.long_context import chunk_major
from lm.long_context import guard as guards
from lm.long_context.cache import Cache
from lm.long_context.eviction import layer_major
from lm.long_context.eviction.evictor import Evictor
from lm.long_context.guard import Report
from lm.long_context.policy import Dense, Method, State
from lm.long_context.program import Held, Program, Request
from lm.sharding import Sharding

Params = transformer.Params


def _engine(policy: Method) -> ModuleType:
    """What fills the cache and makes the context of a step."""
    return layer_major if isinstance(policy, Evictor) else chunk_major


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """The loop's state. Draw number `step` of a sequence goes into column `step` of `tokens`."""

    cache: Cache
    policy: State
    reads: jax.Array  # [L, B] float32: tokens read, summed over decode steps
    guard: Report | None
    keys: jax.Array  # [B] one key per sequence
    last: jax.Array  # [B] int32, drawn but not yet in the cache
    tokens: jax.Array  # [B, max_new_tokens] int32
    log_probs: jax.Array  # [B, max_new_tokens] float32
    counts: jax.Array  # [B] int32, tokens before the stop token
    stopped: jax.Array  # [B] bool
    done: jax.Array  # [B] bool, stopped or not a sequence at all
    step: jax.Array  # [] int32, draws made
    steps: jax.Array  # [B] int32, decode steps that were a sequence's own


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a call read, per sequence; on the host."""

    reads: np.ndarray  # [L, B] float32: tokens read, summed over decode steps
    steps: np.ndarray  # [B] int32: decode steps
    policy: dict[str, np.ndarray]  # [L, B, ...] each: `Policy.statistics`
    guard: dict[str, np.ndarray]  # [B] each: `guard.Report`; empty without a guard

    def summary(self, policy: Method) -> dict[str, Any]:
        """`tokens_read` (mean per step and layer, None without a step; a guard's dense steps count
        where their result is used), what the policy and the guard have to say."""
        steps = int(self.steps.sum())
        reads = float(self.reads.sum()) / (steps * len(self.reads)) if steps else None
        found = {"tokens_read": reads, **policy.summarize(self.policy)}
        if self.guard:
            found["guard"] = guards.summary(self.guard)
        return found


def decode(
    model: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    sampling: SamplingConfig,
    policy: Method,
    stop_ids: Sequence[int],
    key: jax.Array,
    **options: Any,
) -> tuple[list[Generation], Statistics]:
    """`stream` in one piece, with its options."""
    options = {**options, "chunk": sampling.max_new_tokens}
    (whole,) = stream(model, params, prompts, sampling, policy, stop_ids, key, **options)
    return whole


def stream(
    model: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],  # int32 [n] each
    sampling: SamplingConfig,
    policy: Method,
    stop_ids: Sequence[int],
    key: jax.Array,
    *,
    sharding: Sharding | None = None,
    implementation: str | None = None,
    valid_vocab: int | None = None,
    capacity: int | None = None,
    indices: Sequence[int] | None = None,
    extra: Sequence[np.ndarray] | None = None,
    after: Sequence[np.ndarray] | None = None,
    chunk: int = 16,
) -> Iterator[tuple[list[Generation], Statistics]]:
    """Continues every prompt until a stop token or `sampling.max_new_tokens`, in pieces of `chunk`
    tokens a sequence, with the statistics so far.

    Args:
      params: cast to the compute dtype here; a caller of many batches casts once
        (`lm.generate.prepare`).
      policy: which slots a step reads.
      stop_ids: end a sequence; the token that did is not part of it.
      key: sequence i draws from `fold_in(key, indices[i])`, whatever the rest of the batch is.
      capacity: the context that is asked for, in tokens, those to generate included; None takes
        what the longest prompt needs.
      indices: by default the position in `prompts`.
      extra: tokens after each prompt, int32 [n] each, for methods that keep by what they attend to;
        nothing of them is kept.
      after: the end of each prompt, int32 [n] each, which an evictor does not see when it chooses:
        a question that comes once the prompt has been dropped in parts.

    Raises:
      UserError: no prompts, an empty one, one that does not fit into the capacity, or a policy that
        does not fit the model, the mesh, the capacity or the extra tokens.
      ops.dispatch.Unsupported: the named implementation cannot serve.
    """
    if chunk < 1:
        raise UserError(f"chunk={chunk} must be at least 1")
    program = Program(model, sampling, policy, 0, sharding, implementation, valid_vocab)
    ends = None if after is None else _ends(program, prompts, after)
    more = 0 if ends is None else ends[0].shape[1]
    program, arguments = request(program, prompts, stop_ids, key, capacity, indices, extra, more)
    params = generate.prepare(model, params)
    arguments = policy.ahead(program, params, arguments)
    state = prefill(program, params, *arguments)
    if ends is not None:
        count = len(arguments.lengths) - len(prompts)
        tokens, rows = (np.pad(x, [(0, count)] + [(0, 0)] * (x.ndim - 1)) for x in ends)
        state = follow(program, params, state, tokens, rows, arguments.stop_ids)
    decode = functools.partial(advance, stepping(program), params)
    found = generate.pieces(decode, state, arguments.stop_ids, len(prompts), sampling, chunk)
    for piece, state in found:
        yield piece, statistics(program, state, len(prompts))


def measure(
    program: Program,
    params: Params,
    prompts: Sequence[np.ndarray],
    key: jax.Array,
    capacity: int | None = None,
    extra: Sequence[np.ndarray] | None = None,
) -> Timing:
    """Times one batch, step by step, after a run that compiles; what another model does ahead is
    part of prefill. No token stops it."""
    policy = program.policy
    program, arguments = request(program, prompts, (), key, capacity, None, extra)
    params = generate.prepare(program.model, params)

    def first() -> LoopState:
        return prefill(program, params, *policy.ahead(program, params, arguments))

    return generate.timed(
        first,
        functools.partial(advance, stepping(program), params),
        arguments.stop_ids,
        program.sampling.max_new_tokens,
    )


def stepping(program: Program) -> Program:
    """The program of `advance`: one for all methods whose steps are the same."""
    return dataclasses.replace(program, policy=program.policy.steps)


def request(
    program: Program,
    prompts: Sequence[np.ndarray],
    stop_ids: Sequence[int],
    key: jax.Array,
    capacity: int | None = None,
    indices: Sequence[int] | None = None,
    extra: Sequence[np.ndarray] | None = None,
    more: int = 0,
) -> tuple[Program, Request]:
    """The program with its capacity, and the padded arguments of `prefill`. Raises UserError as
    `stream` does.

    The program's policy is the method's `inner` one: before `prefill` comes the method's `ahead`.
    more: tokens that `follow` is to find room for.
    """
    program.policy.check(program.model, program.sharding, capacity)
    program = dataclasses.replace(program, policy=program.policy.inner(program.sampling))
    engine = _engine(program.policy)
    new = program.sampling.max_new_tokens + more
    roomy = dataclasses.replace(
        program, sampling=dataclasses.replace(program.sampling, max_new_tokens=new)
    )
    whole = None if capacity is None else capacity + more
    size, slots = engine.room(roomy, generate.prompt_lengths(prompts), whole)
    tokens, lengths, numbers = generate.pad(prompts, indices, size, program.sharding)
    tokens, rows = engine.extended(program, tokens, lengths, extra)
    program = dataclasses.replace(program, capacity=slots)
    return program, Request(tokens, lengths, numbers, generate.pad_stops(stop_ids), key, rows)


def statistics(program: Program, state: LoopState, count: int) -> Statistics:
    """Of the first `count` sequences."""
    found = program.policy.statistics(state.policy)
    report = {} if state.guard is None else dataclasses.asdict(state.guard)
    reads, steps, found, report = jax.device_get((state.reads, state.steps, found, report))
    return Statistics(
        reads[:, :count],
        steps[:count],
        {name: x[:, :count] for name, x in found.items()},
        {name: x[:count] for name, x in report.items()},
    )


@functools.partial(jax.jit, static_argnums=0)
def prefill(
    program: Program,
    params: Params,
    tokens: jax.Array,  # [B, P] int32, padded on the right
    lengths: jax.Array,  # [B] int32; 0: no sequence, only padding of the batch
    indices: jax.Array,  # [B] int32
    stop_ids: jax.Array,  # [stops] int32
    key: jax.Array,  # []
    rows: jax.Array | None = None,  # [B] int32: with the extra rows after a prompt
    places: jax.Array | None = None,  # [B, P] int32: positions; None: as the tokens lie
) -> LoopState:
    """Fills the cache and draws the first token of every sequence."""
    B, engine = len(lengths), _engine(program.policy)
    logits, held = engine.prefill(program, params, tokens, lengths, rows, places)
    behind = lengths
    if places is not None:
        last = jnp.maximum(lengths, 1)[:, None] - 1
        behind = jnp.take_along_axis(places, last, axis=1)[:, 0] + 1
    state = LoopState(
        cache=Cache(held.buffers, behind, program.policy.rope),
        policy=held.policy,
        reads=held.reads,
        guard=None if program.policy.guard is None else Report.empty(B),
        **generate.nothing_drawn(key, indices, lengths, program.sampling.max_new_tokens),
        steps=jnp.zeros(B, jnp.int32),
    )
    return _drawn(program, state, logits, stop_ids)


def _ends(
    program: Program, prompts: Sequence[np.ndarray], after: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, Q] and rows [B], int32, of what follows each prompt. Raises UserError."""
    if not drops(program.policy, program.sampling):
        name = type(program.policy).__name__
        raise UserError(f"{name} drops nothing: give it the whole prompt")
    if len(after) != len(prompts) or not all(map(len, after)):
        raise UserError("every prompt needs an end of at least one token")
    rows = np.array([len(one) for one in after], np.int32)
    tokens = np.zeros((len(after), generate.bucket(int(rows.max()))), np.int32)
    for row, one in zip(tokens, after, strict=True):
        row[: len(one)] = one
    return tokens, rows


def drops(policy: Method, sampling: SamplingConfig) -> bool:
    """Whether a question that comes `after` finds less than the whole prompt."""
    return isinstance(policy.inner(sampling), Evictor)


@functools.partial(jax.jit, static_argnums=0)
def follow(
    program: Program,
    params: Params,
    state: LoopState,
    tokens: jax.Array,  # [B, Q] int32, padded on the right
    rows: jax.Array,  # [B] int32: of the Q, a sequence's own
    stop_ids: jax.Array,  # [stops] int32
) -> LoopState:
    """The state of `prefill` once more tokens were read behind what was kept of a prompt: the first
    token is drawn again."""
    starts = state.cache.lengths
    held = Held(state.cache.buffers, state.policy, state.reads)
    context = layer_major.step(program, held, starts, rows)
    positions = starts[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    states, context = transformer.hidden(program.model, params, tokens, positions, context)
    last = jnp.maximum(rows, 1)[:, None, None] - 1
    states = jnp.take_along_axis(states, last, axis=1)[:, 0]
    logits = transformer.logits(program.model, params, states)
    lengths, new = starts + rows, program.sampling.max_new_tokens
    nothing = generate.nothing_drawn(jax.random.key(0), starts, rows, new)
    state = dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, buffers=context.state.buffers, lengths=lengths),
        **{**nothing, "keys": state.keys},
    )
    return _drawn(program, state, logits, stop_ids)


def empty(program: Program, batch: int) -> Held:
    """Before the first chunk of a prompt, for methods that read less."""
    return chunk_major.empty(program, batch)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(
    program: Program, params: Params, state: LoopState, stop_ids: jax.Array, limit: jax.Array
) -> LoopState:
    """Goes on until `limit` draws have been made or every sequence is done."""

    def unfinished(state: LoopState) -> jax.Array:
        return (state.step < limit) & ~jnp.all(state.done)

    def step(state: LoopState) -> LoopState:
        active = ~state.done
        held = Held(state.cache.buffers, state.policy, state.reads)
        starts = state.cache.lengths
        logits, held = step_logits(program, params, state.last, held, starts, active)
        report = state.guard
        if program.policy.guard is not None:
            logits = sampling.masked_logits(logits, program.valid_vocab)
            logits, buffers, report = guards.guarded(
                program.policy.guard,
                report,
                logits,
                held.buffers,
                starts,
                lambda buffers: _dense_step(program, params, state.last, buffers, starts, active),
                step=state.step,
                active=active,
            )
            # what is decoded densely reads everything, beside what was selected in vain
            dense = report.dense_steps - state.guard.dense_steps
            reads = held.reads + (dense * (starts + 1)).astype(jnp.float32)[None]
            held = held._replace(buffers=buffers, reads=reads)
        state = dataclasses.replace(
            state,
            cache=dataclasses.replace(
                state.cache, buffers=held.buffers, lengths=starts + active.astype(jnp.int32)
            ),
            policy=held.policy,
            reads=held.reads,
            guard=report,
            steps=state.steps + active,
        )
        return _drawn(program, state, logits, stop_ids)

    return jax.lax.while_loop(unfinished, step, state)


def step_logits(
    program: Program,
    params: Params,
    tokens: jax.Array,  # [B] int32
    held: Held,
    starts: jax.Array,  # [B] int32: tokens before this one
    active: jax.Array,  # [B] bool
    drop: jax.Array | None = None,  # [B, 2] int32
) -> tuple[jax.Array, Held]:
    """Logits [B, V] float32 after one more token of every sequence, and the cache with it.

    drop: slots from .. to that nobody reads in this step, though they were picked; the others keep
    their positions.
    """
    engine = _engine(program.policy)
    context = engine.step(program, held, starts, active.astype(jnp.int32), drop=drop)
    states, context = transformer.hidden(
        program.model, params, tokens[:, None], starts[:, None], context
    )
    return transformer.logits(program.model, params, states[:, 0]), context.state


def _dense_step(program, params, tokens, buffers, starts, active):
    """Logits and buffers of the same step, everything read."""
    dense = dataclasses.replace(program, policy=Dense(rope=program.policy.rope))
    nothing = jnp.zeros((program.model.num_layers, len(starts)), jnp.float32)
    logits, held = step_logits(dense, params, tokens, Held(buffers, {}, nothing), starts, active)
    return sampling.masked_logits(logits, program.valid_vocab), held.buffers


def _drawn(program: Program, state: LoopState, logits: jax.Array, stop_ids: jax.Array) -> LoopState:
    new = generate.drawn(state, logits, stop_ids, program.sampling, program.valid_vocab)
    return new if program.sharding is None else _whole(program, new)


def _whole(program: Program, state: LoopState) -> LoopState:
    """The cache split over sequences and heads; what the host reads whole everywhere."""
    sharding = program.sharding
    held = _engine(program.policy).placed(
        program, Held(state.cache.buffers, state.policy, state.reads)
    )
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, buffers=held.buffers),
        policy=held.policy,
        reads=held.reads,
        **generate.whole(state, sharding, "steps"),
    )
