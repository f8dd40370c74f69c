# SPDX-License-Identifier: Apache-2.0
"""Batched generation: one jitted prefill, then one jitted `lax.while_loop` over explicit state.

Lengths are bucketed, so that requests of many lengths share a few compiled programs, and what a
sequence gets does not depend on who else is in the batch: rows are padded on the right, and every
sequence draws from its own keys.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lm import contexts, sampling, transformer
from lm.config import ModelConfig, SamplingConfig
from lm.errors import UserError
from lm.sharding import Sharding

Params = transformer.Params
S = TypeVar("S")  # the state of a decode loop


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """What one prompt gave; from `stream`, what is new since the last piece."""

    tokens: np.ndarray  # [n] int32, without the stop token
    log_probs: np.ndarray  # [n] float32, under the model itself: temperature 1, nothing filtered
    stopped: bool  # a stop token ended it, not `max_new_tokens`


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds on the device for one batch, compilation excluded."""

    prefill: float  # until the first token of every sequence
    steps: np.ndarray  # [n] per decode step, each giving every unfinished sequence a token

    def summary(self, sequences: int) -> dict[str, float]:
        """`prefill_ms`, `token_ms_p50` and `token_ms_p95` (NaN for a single token), and throughput.

        `tokens_per_s` counts those of all `sequences` of the batch, prefill included.
        """
        p50, p95 = np.percentile(self.steps, [50, 95]) if len(self.steps) else (np.nan, np.nan)
        seconds = self.prefill + float(self.steps.sum())
        return {
            "prefill_ms": 1e3 * self.prefill,
            "token_ms_p50": 1e3 * float(p50),
            "token_ms_p95": 1e3 * float(p95),
            "tokens_per_s": sequences * (1 + len(self.steps)) / seconds,
            "sequences": sequences,
        }


@dataclasses.dataclass(frozen=True)
class Program:
    """All that is static in the two compiled functions."""

    model: ModelConfig
    sampling: SamplingConfig
    capacity: int
    sharding: Sharding | None
    implementation: str | None
    valid_vocab: int | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The loop's state. Draw number `step` of a sequence goes into column `step` of `tokens`."""

    cache: contexts.Cache
    keys: jax.Array  # [B] one key per sequence
    last: jax.Array  # [B] int32, drawn but not yet in the cache
    tokens: jax.Array  # [B, max_new_tokens] int32
    log_probs: jax.Array  # [B, max_new_tokens] float32
    counts: jax.Array  # [B] int32, tokens before the stop token
    stopped: jax.Array  # [B] bool
    done: jax.Array  # [B] bool, stopped or not a sequence at all
    step: jax.Array  # [] int32, draws made


def generate(
    model_config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],  # int32 [n] each
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    key: jax.Array,
    *,
    sharding: Sharding | None = None,
    implementation: str | None = None,
    valid_vocab: int | None = None,
    capacity: int | None = None,
    indices: Sequence[int] | None = None,
) -> list[Generation]:
    """Continues every prompt until a stop token or `sampling.max_new_tokens`.

    Args:
      params: cast to the compute dtype here; a caller of many batches casts once (`prepare`).
      stop_ids: end a sequence; the token that did is not part of it.
      key: sequence i draws from `fold_in(key, indices[i])`, whatever the rest of the batch is.
      capacity: cache slots per sequence; None takes what the longest prompt needs.
      indices: by default the position in `prompts`.

    Raises:
      UserError: no prompts, an empty one, or one that does not fit into the capacity.
      ops.dispatch.Unsupported: the named implementation cannot serve.
    """
    found = stream(
        model_config,
        params,
        prompts,
        sampling,
        stop_ids,
        key,
        sharding=sharding,
        implementation=implementation,
        valid_vocab=valid_vocab,
        capacity=capacity,
        indices=indices,
        chunk=sampling.max_new_tokens,
    )
    (everything,) = found
    return everything


def stream(
    model_config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    key: jax.Array,
    *,
    sharding: Sharding | None = None,
    implementation: str | None = None,
    valid_vocab: int | None = None,
    capacity: int | None = None,
    indices: Sequence[int] | None = None,
    chunk: int = 16,
    ready: Callable[[], None] | None = None,
) -> Iterator[list[Generation]]:
    """`generate` in pieces of `chunk` tokens a sequence, one host visit each.

    Concatenated, the pieces are what `generate` returns; `stopped` is set in the piece that ends
    a sequence, and later pieces of it are empty. Raises as `generate` does, at the first piece.

    ready: called when the device has finished the prompts and the first tokens, to time the rest.
    """
    if chunk < 1:
        raise UserError(f"chunk={chunk} must be at least 1")
    program = Program(model_config, sampling, 0, sharding, implementation, valid_vocab)
    program, arguments = request(program, prompts, stop_ids, key, capacity, indices)
    params = prepare(model_config, params)
    state = begin(program, params, *arguments)
    if ready is not None:
        jax.block_until_ready(state)
        ready()
    decode = functools.partial(advance, program, params)
    for piece, _ in pieces(decode, state, arguments[-2], len(prompts), sampling, chunk):
        yield piece


def pieces(
    decode: Callable[[S, np.ndarray, int], S],
    state: S,
    stop_ids: np.ndarray,
    count: int,
    sampling: SamplingConfig,
    chunk: int,
) -> Iterator[tuple[list[Generation], S]]:
    """What `count` sequences give, every `chunk` draws, and the state then.

    decode: (state, stop_ids, limit) -> the state after `limit` draws.
    """
    seen = np.zeros(count, np.int32)
    for limit in range(chunk, sampling.max_new_tokens + chunk, chunk):
        state = decode(state, stop_ids, min(limit, sampling.max_new_tokens))
        piece, seen, finished = collect(state, seen)
        yield piece, state
        if finished:
            return


def measure(
    model_config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    sampling: SamplingConfig,
    key: jax.Array,
    *,
    sharding: Sharding | None = None,
    implementation: str | None = None,
    valid_vocab: int | None = None,
) -> Timing:
    """Times one batch, step by step, after a run that compiles. No token stops it."""
    program = Program(model_config, sampling, 0, sharding, implementation, valid_vocab)
    program, arguments = request(program, prompts, (), key, None, None)
    params = prepare(model_config, params)
    prefill = functools.partial(begin, program, params, *arguments)
    decode = functools.partial(advance, program, params)
    return timed(prefill, decode, arguments[-2], sampling.max_new_tokens)


def timed(
    prefill: Callable[[], S],
    decode: Callable[[S, np.ndarray, int], S],
    stop_ids: np.ndarray,
    new_tokens: int,
) -> Timing:
    """Times `prefill` and every draw after it, after a run of both that compiles; see `pieces`."""
    jax.block_until_ready(decode(prefill(), stop_ids, min(2, new_tokens)))
    start = time.perf_counter()
    state = jax.block_until_ready(prefill())
    first, steps = time.perf_counter() - start, []
    for limit in range(2, new_tokens + 1):
        start = time.perf_counter()
        state = jax.block_until_ready(decode(state, stop_ids, limit))
        steps.append(time.perf_counter() - start)
    return Timing(first, np.array(steps))


def cast(config: ModelConfig, params: Params) -> Params:
    """The parameters in the compute dtype; those that are in it already are shared, not copied."""
    return jax.tree.map(lambda x: jnp.asarray(x, config.dtype), params)


def prepare(config: ModelConfig, params: Params) -> Params:
    """`cast`, and every layer by itself (`transformer.unstacked`), which decoding steps read
    without a copy. What is so already is shared; stacked layers are copied, and arrays of the host
    go to the device once."""
    if all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params)):
        return cast(config, transformer.unstacked(params))
    return transformer.unstacked(cast(config, params))


def bucket(length: int) -> int:
    """The padded length: 16, 32, 64, 128, then powers of two and the points halfway between."""
    size = 16
    while size < length:
        if 128 <= size < length <= size + size // 2:
            return size + size // 2
        size *= 2
    return size


def request(
    program: Program,
    prompts: Sequence[np.ndarray],
    stop_ids: Sequence[int],
    key: jax.Array,
    capacity: int | None,
    indices: Sequence[int] | None,
) -> tuple[Program, tuple[Any, ...]]:
    """The program with its capacity, and the padded arguments of `begin`."""
    new = program.sampling.max_new_tokens
    lengths = prompt_lengths(prompts)
    longest = max(lengths)
    if capacity is not None and longest + new > capacity:
        raise UserError(
            f"prompt {lengths.index(longest)} has {longest} tokens and {new} new ones are asked "
            f"for: {longest + new} do not fit into a capacity of {capacity}"
        )
    size = bucket(longest)
    if capacity is None:
        capacity = -(-(size + new) // 64) * 64
    padded = pad(prompts, indices, min(size, capacity), program.sharding)
    program = dataclasses.replace(program, capacity=capacity)
    return program, (*padded, pad_stops(stop_ids), key)


def prompt_lengths(prompts: Sequence[Sized]) -> list[int]:
    """Tokens of each prompt, or characters. Raises UserError: no prompts, or an empty one."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths:
        raise UserError("nothing to generate: no prompts")
    if min(lengths) == 0:
        raise UserError(f"prompt {lengths.index(0)} is empty: generation needs a token to go on")
    return lengths


def pad(
    prompts: Sequence[np.ndarray],
    indices: Sequence[int] | None,
    size: int,
    sharding: Sharding | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [B, size], lengths [B] and indices [B], int32, of a batch filled up with sequences of
    length 0. Raises UserError unless there is an index for every prompt."""
    if indices is not None and len(indices) != len(prompts):
        raise UserError(f"{len(indices)} indices for {len(prompts)} prompts")
    batch = _batch_bucket(len(prompts), sharding)
    tokens = np.zeros((batch, size), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[: len(prompt)] = prompt
    lengths, numbers = np.zeros((2, batch), np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    numbers[: len(prompts)] = np.arange(len(prompts)) if indices is None else indices
    return tokens, lengths, numbers


def pad_stops(stop_ids: Sequence[int]) -> np.ndarray:
    """Stop tokens, int32: -1 is no token, and room for a few more keeps the program."""
    stops = np.full(-(-max(len(stop_ids), 1) // 8) * 8, -1, np.int32)
    stops[: len(stop_ids)] = stop_ids
    return stops


def _batch_bucket(count: int, sharding: Sharding | None) -> int:
    """A power of two of sequences for each part of the batch."""
    parts = 1 if sharding is None else sharding.size("batch")
    return parts * (1 << (-(-count // parts) - 1).bit_length())


def collect(state: Any, seen: np.ndarray) -> tuple[list[Generation], np.ndarray, bool]:
    """What is new for every sequence since `seen` tokens, the new counts, and whether all ended.

    state: of a loop, with `tokens`, `log_probs`, `counts`, `stopped` and `done`.
    """
    fields = state.tokens, state.log_probs, state.counts, state.stopped, state.done
    tokens, log_probs, counts, stopped, done = jax.device_get(fields)
    count = len(seen)
    piece = [
        Generation(
            tokens[i, seen[i] : counts[i]], log_probs[i, seen[i] : counts[i]], bool(stopped[i])
        )
        for i in range(count)
    ]
    return piece, counts[:count], bool(done.all())


@functools.partial(jax.jit, static_argnums=0)
def begin(
    program: Program,
    params: Params,
    tokens: jax.Array,  # [B, T] int32, padded on the right
    lengths: jax.Array,  # [B] int32; 0: no sequence, only padding of the batch
    indices: jax.Array,  # [B] int32
    stop_ids: jax.Array,  # [stops] int32
    key: jax.Array,  # []
) -> _State:
    """Fills the cache and draws the first token of every sequence."""
    logits, cache = prefill_logits(
        program.model,
        params,
        tokens,
        lengths,
        program.capacity,
        sharding=program.sharding,
        implementation=program.implementation,
    )
    state = _State(
        cache=cache,
        **nothing_drawn(key, indices, lengths, program.sampling.max_new_tokens),
    )
    return _drawn(program, state, logits, stop_ids)


def nothing_drawn(
    key: jax.Array, indices: jax.Array, lengths: jax.Array, new_tokens: int
) -> dict[str, jax.Array]:
    """The fields of a loop's state that `drawn` fills; sequences of length 0 are done."""
    B = len(lengths)
    return {
        "keys": jax.vmap(lambda index: jax.random.fold_in(key, index))(indices),
        "last": jnp.zeros(B, jnp.int32),
        "tokens": jnp.zeros((B, new_tokens), jnp.int32),
        "log_probs": jnp.zeros((B, new_tokens), jnp.float32),
        "counts": jnp.zeros(B, jnp.int32),
        "stopped": jnp.zeros(B, bool),
        "done": lengths == 0,
        "step": jnp.zeros((), jnp.int32),
    }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(
    program: Program, params: Params, state: _State, stop_ids: jax.Array, limit: jax.Array
) -> _State:
    """Goes on until `limit` draws have been made or every sequence is done."""

    def unfinished(state: _State) -> jax.Array:
        return (state.step < limit) & ~jnp.all(state.done)

    def step(state: _State) -> _State:
        logits, cache = decode_logits(
            program.model,
            params,
            state.last,
            state.cache,
            advance=jnp.where(state.done, 0, 1),
            sharding=program.sharding,
            implementation=program.implementation,
        )
        return _drawn(program, dataclasses.replace(state, cache=cache), logits, stop_ids)

    return jax.lax.while_loop(unfinished, step, state)


def prefill_logits(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,  # [B, T] int32, padded on the right
    lengths: jax.Array,  # [B] int32
    capacity: int,
    *,
    sharding: Sharding | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, contexts.Cache]:
    """Logits [B, V] float32 after the last token of every prompt, and the filled cache."""
    B, T = tokens.shape
    cache = contexts.Cache.empty(config, B, capacity)
    context = contexts.Prefill(cache, lengths, sharding, implementation)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    states, context = transformer.hidden(config, params, tokens, positions, context)
    rows = jnp.maximum(lengths, 1) - 1
    last = jnp.take_along_axis(states, rows[:, None, None], axis=1)[:, 0]  # [B, D]
    return transformer.logits(config, params, last), context.cache


def decode_logits(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,  # [B] int32
    cache: contexts.Cache,
    *,
    advance: jax.Array | int = 1,  # [B] or scalar int32: 0 leaves a sequence where it is
    sharding: Sharding | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, contexts.Cache]:
    """Logits [B, V] float32 after one more token of every sequence, and the cache with it."""
    context = contexts.Decode(cache, sharding, implementation)
    states, context = transformer.hidden(
        config, params, tokens[:, None], cache.lengths[:, None], context
    )
    return transformer.logits(config, params, states[:, 0]), context.advanced(advance)


def _drawn(program: Program, state: _State, logits: jax.Array, stop_ids: jax.Array) -> _State:
    new = drawn(state, logits, stop_ids, program.sampling, program.valid_vocab)
    return new if program.sharding is None else _placed(new, program.sharding)


def drawn(
    state: S,
    logits: jax.Array,  # [B, V] float32
    stop_ids: jax.Array,  # [stops] int32
    config: SamplingConfig,
    valid_vocab: int | None,
) -> S:
    """Draws a token for every sequence that is not done and files it.

    state: of a loop, with the fields of `nothing_drawn`.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.step)
    token = sampling.sample(logits, config, keys, valid_vocab)
    plain = jax.nn.log_softmax(sampling.masked_logits(logits, valid_vocab), axis=-1)
    log_prob = jnp.take_along_axis(plain, token[:, None], axis=1)  # [B, 1]
    stop = jnp.any(token[:, None] == stop_ids[None, :], axis=1) & ~state.done
    keep = ~state.done & ~stop
    column = (0, state.step)
    return dataclasses.replace(
        state,
        last=jnp.where(keep, token, state.last),
        tokens=jax.lax.dynamic_update_slice(
            state.tokens, jnp.where(keep, token, 0)[:, None], column
        ),
        log_probs=jax.lax.dynamic_update_slice(
            state.log_probs, jnp.where(keep[:, None], log_prob, 0.0), column
        ),
        counts=state.counts + keep,
        stopped=state.stopped | stop,
        done=state.done | stop,
        step=state.step + 1,
    )


def _placed(state: _State, sharding: Sharding) -> _State:
    """The cache split over sequences and heads; the rest whole everywhere, for any host to read."""
    cache = dataclasses.replace(
        state.cache,
        k=sharding.constrain(state.cache.k, None, "batch", None, "kv_heads", None),
        v=sharding.constrain(state.cache.v, None, "batch", None, "kv_heads", None),
    )
    return dataclasses.replace(state, cache=cache, **whole(state, sharding))


def whole(state: Any, sharding: Sharding, *more: str) -> dict[str, jax.Array]:
    """The fields of a loop's state that `collect` reads, and `more`, whole on every device."""
    names = ("tokens", "log_probs", "counts", "stopped", "done", *more)
    return {
        name: sharding.constrain(getattr(state, name), *[None] * getattr(state, name).ndim)
        for name in names
    }
