# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of every way to draft, beside plain decoding: same target, prompts, loop and
device, in one run.

Runs of the methods alternate and medians are compared. Prefill is timed apart: tokens_per_s counts
what the loop emits, which drafting changes.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import hardware
from lm.benchmarks.timing import Stopwatch
from lm.config import ModelConfig, SamplingConfig, require_at_least_zero, require_positive
from lm.cp_heads import decode, draft, head
from lm.cp_heads.drafters import Drafter, Target
from lm.cp_heads.head import HeadConfig
from lm.errors import UserError
from lm.progress import Progress, say
from lm.transformer import Params


@dataclasses.dataclass(frozen=True)
class Method:
    """A drafter by name, with its weights and what its row says about it."""

    name: str
    drafter: Drafter
    weights: Any
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed.

    groups: batches that a run decodes one after the other, each of other prompts.
    """

    batches: tuple[int, ...] = (1,)
    temperatures: tuple[float, ...] = (0.0,)
    new_tokens: int = 128
    groups: int = 4
    repeats: int = 5
    seed: int = 0

    def __post_init__(self):
        if not self.batches or not self.temperatures:
            raise UserError("--batches and --temperatures: name one of each at least")
        for batch in self.batches:
            require_positive("--batches", batch)
        for temperature in self.temperatures:
            require_at_least_zero("--temperatures", temperature)
        for name in ("new_tokens", "groups", "repeats"):
            require_positive(f"--{name}", getattr(self, name))
        if self.new_tokens < 2:
            raise UserError("--new_tokens=1: the first token is prefill's, nothing is left to time")


@dataclasses.dataclass
class _Run:
    """A compiled method at one batch size and temperature."""

    method: Method
    program: decode.Program
    params: Params
    weights: Any
    groups: list[tuple[Any, ...]]  # arguments of `decode.prefill`
    stops: jax.Array
    compiled: jax.stages.Compiled
    seconds: list[float] = dataclasses.field(default_factory=list)
    prefill: list[float] = dataclasses.field(default_factory=list)
    found: decode.Statistics | None = None

    def start(self, group: int = 0) -> decode.State:
        """The state after prefill, and its time noted."""
        began = time.perf_counter()
        state = decode.prefill(
            self.program, self.params, self.weights, *self.groups[group], self.stops
        )
        jax.block_until_ready(state)
        self.prefill.append(time.perf_counter() - began)
        return state

    def advance(self, state: decode.State, cycles: int) -> decode.State:
        most = np.int32(self.program.target.sampling.max_new_tokens)
        return self.compiled(self.params, self.weights, state, self.stops, most, np.int32(cycles))

    def once(self) -> None:
        """One timed decode of every group."""
        seconds, found = 0.0, []
        for group in range(len(self.groups)):
            state = self.start(group)
            began = time.perf_counter()
            state = self.advance(state, self.program.target.sampling.max_new_tokens)
            jax.block_until_ready(state)
            seconds += time.perf_counter() - began
            found.append(decode.statistics(state, len(state.counts)))
        self.seconds.append(seconds)
        self.found = sum(found[1:], found[0])

    @property
    def batch(self) -> int:
        return len(self.groups[0][0])

    @property
    def cycles(self) -> int:
        """Turns of the loop in one run: a group goes on until its last sequence is done."""
        calls = self.found.kept.sum(axis=1).reshape(len(self.groups), -1)
        return int(calls.max(axis=1).sum())


def benchmark(
    target: Target,  # its sampling gives top_k and top_p
    params: Params,
    methods: Sequence[Method],
    prompts: Callable[[int], Sequence[np.ndarray]],  # as many as asked for
    stop_ids: Sequence[int] = (),
    options: Options = Options(),
) -> list[dict[str, Any]]:
    """A row for each method, batch size and temperature; the first method is what `speedup` is
    over.

    Every sequence goes on to `new_tokens` unless `stop_ids` end it. Raises UserError for a drafter
    that does not fit.
    """
    for method in methods:
        method.drafter.check(target)
    params = decode.prepare(target, params)
    rows = []
    total = len(options.batches) * len(options.temperatures)
    with Progress("benchmark", total) as progress:
        for temperature in options.temperatures:
            for batch in options.batches:
                sampling = dataclasses.replace(
                    target.sampling, temperature=temperature, max_new_tokens=options.new_tokens
                )
                here = dataclasses.replace(target, sampling=sampling)
                texts = prompts(batch * options.groups)
                rows += _compared(here, params, methods, texts, stop_ids, options)
                progress.advance()
    return rows


def _compared(target, params, methods, prompts, stop_ids, options) -> list[dict[str, Any]]:
    """The rows of one batch size and temperature."""
    key = jax.random.key(options.seed)
    runs = [
        _compiled(target, params, method, prompts, stop_ids, key, options.groups)
        for method in methods
    ]
    for run in runs:
        run.once()  # compiles prefill; warms up
        run.seconds.clear()
        run.prefill.clear()
    for _ in range(options.repeats):
        for run in runs:
            run.once()
    rows = [_row(run, target.sampling) for run in runs]
    for row in rows:
        row["speedup"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        say(
            f"{row['method']}, batch {row['batch']}, temperature {row['temperature']:g}: "
            f"{row['tokens_per_s']:.1f} tokens/s, {row['tokens_per_call']:.2f} per call"
        )
    return rows


def _compiled(target, params, method, prompts, stop_ids, key, groups) -> _Run:
    program, arguments, stops = decode.request(target, method.drafter, prompts, stop_ids, key)
    weights = decode.prepare(target, method.weights)
    *rows, key, stops = jax.device_put((*arguments, stops))
    size = len(prompts) // groups
    split = [(*(x[i * size : (i + 1) * size] for x in rows), key) for i in range(groups)]
    state = jax.eval_shape(
        lambda *a: decode.prefill(program, *a), params, weights, *split[0], stops
    )
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = decode.advance.lower(program, params, weights, state, stops, scalar, scalar)
    return _Run(method, program, params, weights, split, stops, lowered.compile())


def _row(run: _Run, sampling: SamplingConfig) -> dict[str, Any]:
    found = run.found.summary()
    seconds = statistics.median(run.seconds)
    draft_ms = _draft_ms(run) if run.program.drafter.length else 0.0
    cycle_ms = 1e3 * seconds / max(run.cycles, 1)
    tokens = int(np.maximum(run.found.tokens - 1, 0).sum())  # the first is prefill's
    token_ms = _token_ms(run)
    p50, p95 = np.percentile(token_ms, [50, 95]) if len(token_ms) else (np.nan, np.nan)
    return {
        "kind": "decode",
        "method": run.method.name,
        "batch": run.batch,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "tokens_per_s": tokens / seconds,
        "tokens_per_call": found["tokens_per_call"] or 1.0,
        "draft_ms": draft_ms,
        "verify_ms": max(cycle_ms - draft_ms, 0.0),
        "prefill_ms": 1e3 * statistics.median(run.prefill),
        "token_ms_p50": float(p50),
        "token_ms_p95": float(p95),
        "acceptance": found["acceptance"],
        "per_request": [one.summary()["tokens_per_call"] for one in run.found.each()],
        "tokens": tokens,
        "trunk_calls": found["trunk_calls"],
        "peak_bytes": hardware.compiled_bytes(run.compiled),
        "drafter_parameters": sum(x.size for x in jax.tree.leaves(run.method.weights)),
        **run.method.about,
    }


def _draft_ms(run: _Run) -> float:
    """Milliseconds of the drafter's half of a cycle by itself."""
    state = run.advance(run.start(), 1)
    propose = jax.jit(decode.propose, static_argnums=0)
    watch = Stopwatch(
        lambda: propose(run.program, run.params, run.weights, state), jax.block_until_ready
    )
    watch.calibrate()
    for _ in range(5):
        watch.sample()
    return 1e3 * watch.median


def _token_ms(run: _Run) -> np.ndarray:
    """Milliseconds per token, one number for each token: the cycle that emitted it, shared among
    the tokens that a sequence got from it. The host waits for every cycle here."""
    state, out = run.start(), []
    before = np.asarray(state.counts)
    most = run.program.target.sampling.max_new_tokens
    while not np.all(state.done) and len(out) < most * run.batch:
        began = time.perf_counter()
        state = jax.block_until_ready(run.advance(state, 1))
        seconds = time.perf_counter() - began
        after = np.asarray(state.counts)
        new = after - before
        for count in new[new > 0]:
            out += [1e3 * seconds / count] * int(count)
        before = after
    return np.array(out)


def head_cost(
    name: str, model: ModelConfig, config: HeadConfig, batch: int = 1, temperature: float = 0.0
) -> dict[str, Any]:
    """Parameters of a random head for a model's shape and the milliseconds of one draft: only the
    output matrix and the head are in memory. Raises UserError when they do not fit together."""
    head.check(config, model)
    sampling = SamplingConfig(temperature=temperature)
    keys = jax.random.split(jax.random.key(0), 3)
    dtype = jnp.dtype(model.dtype)

    def made(key):
        params = head.init(key, config, model)
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
        )

    weights = jax.jit(made)(keys[0])
    shape = (model.vocab_size, model.embed_dim)
    table = jax.jit(lambda key: jax.random.normal(key, shape, dtype) * shape[1] ** -0.5)(keys[1])
    states = jax.random.normal(keys[2], (batch, model.embed_dim), dtype)
    last = jnp.zeros(batch, jnp.int32)
    row_keys = jax.random.split(keys[0], batch)

    @jax.jit
    def run(weights, states, table):
        factors = draft.factors(weights, config, model, states, table)
        return draft.propose(factors, last, sampling, row_keys)

    watch = Stopwatch(lambda: run(weights, states, table), jax.block_until_ready)
    watch.calibrate()
    for _ in range(5):
        watch.sample()
    return {
        "kind": "head_cost",
        "method": name,
        "rank": config.rank,
        "transition": config.transition,
        "n": config.predicted,
        "batch": batch,
        "temperature": temperature,
        "drafter_parameters": sum(x.size for x in jax.tree.leaves(weights)),
        "draft_ms": 1e3 * watch.median,
    }
