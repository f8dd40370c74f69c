# SPDX-License-Identifier: Apache-2.0
"""Answers of a model that writes its promised parts at once: one jitted prefill, then one jitted
`lax.while_loop` over all threads of all requests.

    found = decode.answers(run, params, decode.Settings(max_tokens=512), ["Count. ..."], seed=0)
    found[0].text, found[0].steps

`Settings.threads` blocks are written at a time; promises beyond that wait for a free row in their
order while main goes on. What comes out does not depend on `threads`, on the batch, or on who ends
when: what a block sees is fixed by its promise, and every thread draws from keys of its own. Two
things remain: `max_tokens` cuts whoever is writing then, and matrix products of other shapes round
in other ways, which in bfloat16 may turn a near-tie.

A model without the tags, or one that promises nothing, writes what `lm.generate` writes, token for
token and draw for draw.

`step` takes what computes the logits and what draws from them as functions: verification forces
tokens, tests replace the model. `composed` puts it together with other methods.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import generate, prompting, sampling, transformer
from lm.async_decoding import language, pool, reading, tables, threads
from lm.async_decoding.answers import Answer
from lm.async_decoding.pool import Pool
from lm.async_decoding.runs import Run
from lm.async_decoding.tables import Tables
from lm.async_decoding.threads import APAR, APAR_SCHEME, ASYNC, Feed, Rules, State
from lm.config import ModelConfig, SamplingConfig, require_positive
from lm.prompting import Speaker
from lm.sharding import Sharding

Params = transformer.Params
Prompt = str | np.ndarray  # a user's message, or the ids [n] of all that comes before the answer
# (what is fed, filled slots [B], pool) -> (logits [B, M, V], pool)
Forward = Callable[[Feed, jax.Array, Any], tuple[jax.Array, Any]]
# (threads before the step, logits) -> tokens [B, M] int32
Choose = Callable[[State, jax.Array], jax.Array]
_BLOCKS = 1 << 30  # folded into the keys of blocks, beyond every draw of main


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are decoded."""

    max_tokens: int = 256  # that come out, over all threads of an answer
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    threads: int = 8  # blocks that are written at a time, beside main
    positions: str | None = None  # None: those that the run was trained with

    def __post_init__(self) -> None:
        require_positive("max_tokens", self.max_tokens)
        require_positive("threads", self.threads)
        _ = self.sampling  # refuses what cannot be drawn from
        if self.positions is not None:
            threads.check_scheme(self.positions)

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.max_tokens)

    def rules(self, scheme: str, form: str = ASYNC) -> Rules:
        """What is static of the threads, for a run that was trained with a scheme of positions, on
        answers of a form. Of a form that has no threads, it is that of a model with the tags."""
        if form == APAR:
            scheme = APAR_SCHEME
        else:
            form = ASYNC
        return Rules(1 + self.threads, self.max_tokens, self.positions or scheme, form)


@dataclasses.dataclass(frozen=True)
class Program:
    """All that is static in the compiled functions."""

    model: ModelConfig
    sampling: SamplingConfig
    rules: Rules
    capacity: int
    sharding: Sharding | None = None
    implementation: str | None = None
    valid_vocab: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loop:
    """The loop's state."""

    pool: Any  # a `Pool`, or what a `Forward` that is no model keeps
    threads: State
    keys: Any  # what draws need, per request: [B] keys


# (program, params, tables, *what `request` gives) -> the loop after the first tokens
Start = Callable[..., Loop]
# (program, params, tables, loop, limit) -> the loop, gone on as `advance` does
Advance = Callable[..., Loop]


class Pieces(NamedTuple):
    """What `speak` runs. `prefill` and `advance` are those of the decoder by itself."""

    start: Start
    advance: Advance


def answers(
    run: Run,
    params: Params,
    settings: Settings,
    prompts: Sequence[Prompt],
    seed: int,
    *,
    batch: int = 16,
    sharding: Sharding | None = None,
    implementation: str | None = None,
    pieces: Pieces | None = None,
) -> list[Answer]:
    """An answer to every prompt.

    Args:
      prompts: messages of a user, put to the run's template, or ids of whole prompts. Tags in a
        message are text.
      seed: request i draws from keys of (seed, i), whatever else is asked.
      batch: so many requests are decoded together, requests of like lengths first. Shapes are
        bucketed: calls with the same settings compile a few programs once.
      pieces: of a composition (`composed.pieces`); None: of the decoder by itself.

    Raises:
      UserError: no prompts, an empty one, or positions that cannot be decoded.
      ops.dispatch.Unsupported: the named implementation cannot serve.
    """
    speaker, trained = prompting.of_run(run.setup, params), run.config.threads
    return speak(
        speaker,
        settings.rules(trained.positions, trained.form),
        settings,
        prompts,
        seed,
        batch=batch,
        sharding=sharding,
        implementation=implementation,
        pieces=pieces,
    )


def speak(
    speaker: Speaker,
    rules: Rules,
    settings: Settings,
    prompts: Sequence[Prompt],
    seed: int,
    *,
    batch: int = 16,
    sharding: Sharding | None = None,
    implementation: str | None = None,
    pieces: Pieces | None = None,
) -> list[Answer]:
    """`answers` of any model; one whose tokenizer lacks the tags answers sequentially."""
    require_positive("batch", batch)
    pieces = pieces or Pieces(prefill, advance)
    generate.prompt_lengths(prompts)  # a template would fill an empty one
    encoded = [encode(speaker, prompt) for prompt in prompts]
    lengths = generate.prompt_lengths(encoded)
    order = sorted(range(len(encoded)), key=lambda index: lengths[index])
    known = _known(speaker)
    found: dict[int, Answer] = {}
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        ids = [encoded[index] for index in chosen]
        program = _program(speaker, rules, settings, ids, sharding, implementation)
        least = batch if len(order) > batch else 0
        arguments = request(program, ids, seed, indices=chosen, least=least)
        state = pieces.start(program, speaker.params, known, *arguments)
        # compiles, and draws nothing
        state = jax.block_until_ready(pieces.advance(program, speaker.params, known, state, 0))
        began = time.perf_counter()
        state = pieces.advance(program, speaker.params, known, state, _ENDLESS)
        state = jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        host = jax.device_get(state.threads)
        for row, index in enumerate(chosen):
            texts = _text(speaker, prompts[index]), encoded[index]
            found[index] = reading.answer(host, row, *texts, speaker, seconds, rules.form)
    return [found[index] for index in range(len(encoded))]


@dataclasses.dataclass(frozen=True)
class Event:
    """Text that is final, in reading order."""

    thread: int  # 0 is main, k the block of the k-th promise
    text: str


def stream(
    run: Run,
    params: Params,
    settings: Settings,
    prompt: Prompt,
    seed: int,
    *,
    chunk: int = 8,
    implementation: str | None = None,
) -> Iterator[Event | Answer]:
    """The answer of `answers` to one prompt, as it becomes final, and at last the `Answer`.

    Main is told up to the first promise whose block is unfinished, then that block as far as it
    is. The texts of the events put together are the answer's.

    Args:
      chunk: steps between two visits of the host.

    Raises as `answers` does, at the first event.
    """
    speaker, trained = prompting.of_run(run.setup, params), run.config.threads
    rules = settings.rules(trained.positions, trained.form)
    options = {"chunk": chunk, "implementation": implementation}
    yield from speak_in_pieces(speaker, rules, settings, prompt, seed, **options)


def speak_in_pieces(
    speaker: Speaker,
    rules: Rules,
    settings: Settings,
    prompt: Prompt,
    seed: int,
    *,
    chunk: int = 8,
    implementation: str | None = None,
) -> Iterator[Event | Answer]:
    """`stream` of any model."""
    require_positive("chunk", chunk)
    ids = [encode(speaker, prompt)]
    known = _known(speaker)
    program = _program(speaker, rules, settings, ids, None, implementation)
    state = prefill(program, speaker.params, known, *request(program, ids, seed))
    state = advance(program, speaker.params, known, state, 0)  # compiles, and draws nothing
    seconds, shown = 0.0, ""
    while True:
        host = jax.device_get(state.threads)
        if host.done[0]:
            break
        new, shown = _unseen(reading.final(host, 0, speaker, rules.form), shown)
        yield from new
        began = time.perf_counter()
        state = advance(program, speaker.params, known, state, int(host.step) + chunk)
        state = jax.block_until_ready(state)
        seconds += time.perf_counter() - began
    texts = _text(speaker, prompt), ids[0]
    found = reading.answer(host, 0, *texts, speaker, seconds, rules.form)
    new, _ = _unseen(found.assembly.segments, shown)
    yield from new
    yield found


def _unseen(segments: Sequence[tuple[int, str]], shown: str) -> tuple[list[Event], str]:
    """What comes after the shown text, and all of it. Where the text of a token depends on its
    neighbours, and what is shown no longer is a beginning, nothing is told until it is again."""
    text = "".join(part for _, part in segments)
    if not text.startswith(shown):
        return [], shown
    skip, found = len(shown), []
    for thread, part in segments:
        if len(part) > skip:
            found.append(Event(thread, part[skip:]))
        skip = max(skip - len(part), 0)
    return found, text


_ENDLESS = np.iinfo(np.int32).max


def encode(speaker: Speaker, prompt: Prompt) -> np.ndarray:
    """Ids [n] int32 of a prompt, in which tags are text."""
    if isinstance(prompt, str):
        return language.encode_prompt(speaker.rendered(prompt), speaker.tokenizer)
    return np.asarray(prompt, np.int32)


def _text(speaker: Speaker, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else speaker.tokenizer.decode(prompt)


def _known(speaker: Speaker) -> Tables:
    found = tables.make(speaker.tokenizer, tuple(speaker.stop_ids), speaker.model.vocab_size)
    return jax.device_put(found)


def _program(
    speaker: Speaker,
    rules: Rules,
    settings: Settings,
    prompts: Sequence[np.ndarray],
    sharding: Sharding | None,
    implementation: str | None,
) -> Program:
    size = generate.bucket(max(generate.prompt_lengths(prompts)))
    capacity = -(-(size + rules.room) // 128) * 128
    return Program(
        speaker.model,
        settings.sampling,
        rules,
        capacity,
        sharding,
        implementation,
        speaker.valid_vocab,
    )


def request(
    program: Program,
    prompts: Sequence[np.ndarray],
    seed: int,
    *,
    indices: Sequence[int] | None = None,
    least: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, jax.Array]:
    """The padded arguments of `prefill`, for `least` requests or more."""
    size = generate.bucket(max(generate.prompt_lengths(prompts)))
    padded = generate.pad(prompts, indices, size, program.sharding)
    most = len(generate.pad([prompts[0]] * max(least, 1), None, size, program.sharding)[1])
    more = max(most - len(padded[1]), 0)
    filled = (np.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) for x in padded)
    return (*filled, jax.random.key(seed))


# --- the compiled pieces


@functools.partial(jax.jit, static_argnums=0)
def prefill(
    program: Program,
    params: Params,
    known: Tables,
    tokens: jax.Array,  # [B, T] int32, padded on the right
    lengths: jax.Array,  # [B] int32; 0: no request, only padding of the batch
    indices: jax.Array,  # [B] int32
    key: jax.Array,  # []
) -> Loop:
    """Fills the pools and draws the first token of every main thread: step 1."""
    logits, filled = pool.prefill(
        program.model,
        params,
        tokens,
        lengths,
        program.capacity,
        sharding=program.sharding,
        implementation=program.implementation,
    )
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    every = jnp.pad(logits[:, None], ((0, 0), (0, program.rules.rows - 1), (0, 0)))
    choose = functools.partial(draw, program, keys)
    state = begin(program.rules, known, lengths, every, choose)
    return _placed(program, Loop(filled, state, keys))


def begin(
    rules: Rules,
    known: Tables,
    lengths: jax.Array,
    logits: jax.Array,
    choose: Choose,
    slots: jax.Array | None = None,
) -> State:
    """Threads after the first token, for logits [B, M, V] of which row 0 counts; `slots` as for
    `threads.start`."""
    state = threads.start(rules, lengths, slots)
    return threads.settle(rules, known, state, choose(state, logits))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def advance(
    program: Program, params: Params, known: Tables, state: Loop, limit: jax.Array | int
) -> Loop:
    """Goes on until every request is done, or has taken `limit` steps."""
    forward = model_forward(program, params)
    choose = functools.partial(draw, program, state.keys)

    def one(state: Loop) -> Loop:
        return _placed(program, step(program.rules, known, state, forward, choose)[0])

    return jax.lax.while_loop(functools.partial(unfinished, limit), one, state)


def unfinished(limit: jax.Array | int, state: Loop) -> jax.Array:
    return ~jnp.all(state.threads.done) & (state.threads.step < limit)


def step(
    rules: Rules, known: Tables, state: Loop, forward: Forward, choose: Choose
) -> tuple[Loop, tuple[Feed, jax.Array]]:
    """One token further in every active thread; also what was fed, and the logits after it."""
    fed, before = threads.feed(state.threads)
    logits, filled = forward(fed, before.slots, state.pool)
    drawn = choose(before, logits)
    settled = threads.settle(rules, known, before, drawn)
    return dataclasses.replace(state, pool=filled, threads=settled), (fed, logits)


def model_forward(program: Program, params: Params) -> Forward:
    """The model on the pool."""

    def forward(fed: Feed, lengths: jax.Array, filled: Pool) -> tuple[jax.Array, Pool]:
        return pool.logits(
            program.model,
            params,
            fed,
            lengths,
            filled,
            sharding=program.sharding,
            implementation=program.implementation,
        )

    return forward


def draw(program: Program, keys: jax.Array, before: State, logits: jax.Array) -> jax.Array:
    """Tokens [B, M] int32. Draw n of main uses key n of its request, as `lm.generate` does; blocks
    have keys of their own."""
    B, M, V = logits.shape
    rows = before.rows

    def key_of(key, thread, count):
        own = jax.random.fold_in(key, _BLOCKS + jnp.maximum(thread, 0))
        return jax.random.fold_in(jnp.where(thread > 0, own, key), count)

    each = jax.vmap(jax.vmap(key_of, in_axes=(None, 0, 0)))(keys, rows.thread, rows.count)
    token = sampling.sample(
        logits.reshape(B * M, V), program.sampling, each.reshape(B * M), program.valid_vocab
    )
    return token.reshape(B, M)


def _placed(program: Program, state: Loop) -> Loop:
    """The pool split over requests and heads; the rest whole everywhere, for any host to read."""
    sharding = program.sharding
    if sharding is None:
        return state
    whole = jax.tree.map(lambda x: sharding.constrain(x, *[None] * x.ndim), state.threads)
    return dataclasses.replace(state, pool=state.pool.placed(sharding), threads=whole)
