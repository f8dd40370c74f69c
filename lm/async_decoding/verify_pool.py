# SPDX-License-Identifier: Apache-2.0
"""Proof that the decoder computes what was trained: its steps, with forced tokens, against layouts.

The code that runs is `decode.step`, as in the loop; only what draws the tokens is replaced.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import generate, losses, transformer
from lm.async_decoding import (
    decode,
    language,
    layout,
    pool,
    positions,
    simulate,
    tables,
    threads,
)
from lm.async_decoding.decode import Loop, Program
from lm.async_decoding.programs import EncodedProgram
from lm.async_decoding.simulate import Name
from lm.async_decoding.tables import Tables
from lm.async_decoding.threads import Rules
from lm.config import ModelConfig, SamplingConfig
from lm.data import packing
from lm.prompting import Speaker
from lm.transformer import Params

FREE = -1  # in a script: the model's own choice
_MULTIPLE = 64  # sizes are rounded up to it, so that few programs are compiled


@functools.partial(jax.jit, static_argnums=0)
def begin(
    program: Program, params: Params, known: Tables, tokens, lengths, script
) -> tuple[Loop, jax.Array]:
    logits, filled = pool.prefill(
        program.model,
        params,
        tokens,
        lengths,
        program.capacity,
        implementation=program.implementation,
    )
    every = jnp.pad(logits[:, None], ((0, 0), (0, program.rules.rows - 1), (0, 0)))
    choose = functools.partial(forced, program, script)
    state = decode.begin(program.rules, known, lengths, every, choose)
    return Loop(filled, state, lengths), logits


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(program: Program, params: Params, known: Tables, state: Loop, script) -> Any:
    forward = decode.model_forward(program, params)
    choose = functools.partial(forced, program, script)
    return decode.step(program.rules, known, state, forward, choose)


def forced(
    program: Program, script: jax.Array, before: threads.State, logits: jax.Array
) -> jax.Array:
    """Tokens [B, M] of a script [B, threads, n]; `FREE` there takes the most likely one."""
    rows = before.rows
    request = jnp.arange(script.shape[0], dtype=jnp.int32)[:, None]
    thread = jnp.clip(rows.thread, 0, script.shape[1] - 1)
    token = script[request, thread, jnp.minimum(rows.count, script.shape[2] - 1)]
    if program.valid_vocab is not None:
        logits = logits[..., : program.valid_vocab]
    return jnp.where(token == FREE, jnp.argmax(logits, axis=-1).astype(jnp.int32), token)


def forcing(program: Program, script: jax.Array) -> decode.Choose:
    """`forced`, as `composed.begin` takes what draws."""
    return functools.partial(forced, program, script)


def script_of(programs: Sequence[EncodedProgram], free_blocks: bool = False) -> np.ndarray:
    """[B, threads, n] int32: what comes out of each thread; blocks by the model with
    `free_blocks`."""
    lines = [
        [program.main, *(np.append(block, program.close) for block in program.blocks)]
        for program in programs
    ]
    most = _up(max(len(line) for of_one in lines for line in of_one))
    script = np.full((len(lines), _up(max(map(len, lines)), 16), most), FREE, np.int32)
    for row, of_one in zip(script, lines, strict=True):
        for number, line in enumerate(of_one[:1] if free_blocks else of_one):
            row[number, : len(line)] = line
    return script


def _up(size: int, multiple: int = _MULTIPLE) -> int:
    return -(-size // multiple) * multiple


def arguments(
    speaker: Speaker,
    programs: Sequence[EncodedProgram],
    rules: Rules,
    implementation: str | None = None,
) -> tuple[Program, Tables, np.ndarray, np.ndarray]:
    """The static part, the tables, and the padded prompts [B, T] with their lengths [B]."""
    lengths = np.array([len(program.prompt) for program in programs], np.int32)
    size = generate.bucket(int(lengths.max()))
    tokens = np.zeros((len(programs), size), np.int32)
    for row, program in zip(tokens, programs, strict=True):
        row[: len(program.prompt)] = program.prompt
    static = Program(
        speaker.model,
        SamplingConfig(max_new_tokens=rules.max_tokens),
        rules,
        _up(size + rules.room),
        None,
        implementation,
        speaker.valid_vocab,
    )
    known = tables.make(speaker.tokenizer, tuple(speaker.stop_ids), speaker.model.vocab_size)
    return static, jax.device_put(known), tokens, lengths


def force(
    speaker: Speaker,
    programs: Sequence[EncodedProgram],
    scheme: str,
    *,
    rows: int,
    free_blocks: bool = False,
    implementation: str | None = None,
) -> tuple[threads.State, list[dict[Name, np.ndarray]]]:
    """Decodes programs, main and (unless `free_blocks`) blocks forced: the threads at the end, and
    of each program the logits [V] after every token that was fed."""
    longest = (len(p.main) + int((language.CAP * p.tokens + 1).sum()) for p in programs)
    rules = Rules(rows, _up(max(longest) + 1), scheme)
    program, known, tokens, lengths = arguments(speaker, programs, rules, implementation)
    script = jnp.asarray(script_of(programs, free_blocks))
    params = speaker.params
    state, first = begin(program, params, known, tokens, lengths, script)
    found = [{(0, int(n) - 1): x} for n, x in zip(lengths, np.asarray(first), strict=True)]
    mains = lengths.copy()
    while not np.asarray(state.threads.done).all():
        indices = np.asarray(state.threads.rows.fed)
        state, (fed, logits) = _step(program, params, known, state, script)
        owners, logits = np.asarray(fed.threads), np.asarray(logits)
        for b, row in np.argwhere(owners >= 0).tolist():
            owner = int(owners[b, row])
            found[b][owner, int(indices[b, row]) if owner else int(mains[b])] = logits[b, row]
        mains += owners[:, 0] == 0
    return jax.device_get(state.threads), found


def pool_logit_error(
    speaker: Speaker,
    programs: Sequence[EncodedProgram],
    scheme: str,
    *,
    rows: int = 4,
    implementation: str | None = None,
) -> float:
    """The largest difference between teacher-forced logits under the layout of programs and those
    of the decoder on the same tokens; infinite unless both have the same tokens."""
    _, found = force(speaker, programs, scheme, rows=rows, implementation=implementation)
    worst = 0.0
    longest = _up(max(program.size for program in programs))
    for program, got in zip(programs, found, strict=True):
        names = layout.names_of(program)
        (row,) = packing.pack([layout.layout_of(program, scheme)], longest)
        expected = np.asarray(
            _layout_logits(speaker.model, implementation, speaker.params, packing.stack([row]))
        )
        silent = {name for name in names if _is_silent(program, name)}
        if not set(names) - silent <= got.keys() <= set(names):
            return float("inf")
        for at, name in enumerate(names):
            if name in got:
                difference = float(np.abs(expected[at] - got[name]).max())
                worst = float("inf") if np.isnan(difference) else max(worst, difference)
    return worst


def _is_silent(program: EncodedProgram, name: Name) -> bool:
    """Whether no logits of a token need be there: inside a prompt, at the end of main, and at the
    end of a block that no sync waits for, since the answer may end before it is fed."""
    thread, index = name
    if not thread:
        before = len(program.prompt)
        return index < before - 1 or index == before + len(program.main) - 1
    waited = program.groups[thread - 1] < len(program.syncs)
    return not waited and index == program.lengths[thread - 1] - 1


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layout_logits(config: ModelConfig, implementation: str | None, params: Params, batch):
    execution = losses.Execution(implementation=implementation)
    states = losses.forward(config, params, batch, execution)
    return transformer.logits(config, params, states[0])


def sequential_mismatches(
    speaker: Speaker,
    prompts: Sequence[np.ndarray],
    max_tokens: int,
    *,
    temperatures: Sequence[float] = (0.0,),
    threads: int = 3,
    scheme: str = "predicted",
    implementation: str | None = None,
) -> int:
    """How many answers differ from those of `lm.generate`, of a model that completes no promise:
    there is one thread, and every token has to be the same, drawn or not."""
    wrong = 0
    for temperature in temperatures:
        settings = decode.Settings(max_tokens, temperature, threads=threads)
        found = decode.speak(
            speaker, settings.rules(scheme), settings, prompts, 0, implementation=implementation
        )
        plain = generate.generate(
            speaker.model,
            speaker.params,
            prompts,
            settings.sampling,
            speaker.stop_ids,
            jax.random.key(0),
            implementation=implementation,
            valid_vocab=speaker.valid_vocab,
        )
        for one, other in zip(found, plain, strict=True):
            ids = one.threads[0].ids
            if one.finished:
                ids = ids[:-1]
            wrong += one.finished != other.stopped or not np.array_equal(ids, other.tokens)
    return wrong


def thread_mismatches(
    speaker: Speaker,
    programs: Sequence[EncodedProgram],
    scheme: str,
    *,
    implementation: str | None = None,
) -> int:
    """How many programs get other blocks when the same main threads are decoded again, at
    temperature 0, with the same and with fewer rows for blocks."""
    runs = []
    for rows in (4, 4, 2):
        options: dict[str, Any] = {"free_blocks": True, "implementation": implementation}
        state, _ = force(speaker, programs, scheme, rows=rows, **options)
        runs.append([_by_thread(state, row) for row in range(len(programs))])
    return sum(any(other[row] != runs[0][row] for other in runs) for row in range(len(programs)))


def _by_thread(state: threads.State, row: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    count = int(state.decoded[row])
    owners, tokens = state.log.threads[row, :count], state.log.tokens[row, :count]
    for owner, token in zip(owners.tolist(), tokens.tolist(), strict=True):
        found.setdefault(owner, []).append(token)
    return found


def check(
    speaker: Speaker,
    programs: Sequence[EncodedProgram],
    prompts: Sequence[np.ndarray],
    *,
    seed: int = 0,
    random_programs: int = 4,
    max_tokens: int = 32,
    implementation: str | None = None,
    advance: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """`pool_logit_error` over all decodable schemes of the programs and of random ones, and the
    mismatches of plain answers to the prompts and of threads that are decoded again.

    advance: called after each part of `PARTS`.
    """
    rng = np.random.default_rng(seed)
    end = speaker.stop_ids[0]
    made = [simulate.random_answer(rng, speaker.tokenizer, end) for _ in range(random_programs)]
    worst = 0.0
    for scheme in positions.DECODABLE:
        options: dict[str, Any] = {"rows": 4, "implementation": implementation}
        error = pool_logit_error(speaker, [*programs, *made], scheme, **options)
        worst = max(worst, error)
        advance()
    wrong = sequential_mismatches(speaker, prompts, max_tokens, implementation=implementation)
    advance()
    everything = [*programs, *made]
    wrong += thread_mismatches(speaker, everything, "predicted", implementation=implementation)
    advance()
    return worst, wrong


PARTS = len(positions.DECODABLE) + 2
