# SPDX-License-Identifier: Apache-2.0
"""Time to the first token, time per token, throughput and memory of methods beside each other.

Methods take turns on one device and medians are compared. A cell is a context (the tokens of a
prompt) at a batch size; prompts are random tokens. Where a prompt would take too long, the cache
can be filled with random keys and values instead: then a row says `"prompt": "filled"` and has no
time to the first token.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import generate, hardware, transformer
from lm.config import ModelConfig, SamplingConfig, require_positive
from lm.errors import UserError
from lm.long_context import cache, decode, quality
from lm.long_context.cache import Cache
from lm.long_context.decode import LoopState
from lm.long_context.guard import Report
from lm.long_context.methods import DENSE, Methods
from lm.long_context.policy import Method
from lm.long_context.program import Held, Program
from lm.progress import Progress, say
from ops import dispatch

Row = dict[str, Any]
SLACK = 0.1  # of the memory, for what steps make on the way


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed.

    methods: names of the table; () takes dense attention and the paper's own.
    budget: of methods other than dense; None is the table's.
    new_tokens: decode steps that are timed one by one, and as many in one go.
    filled: random keys and values in place of prompts.
    """

    methods: tuple[str, ...] = ()
    contexts: tuple[int, ...] = (4096,)
    batch_sizes: tuple[int, ...] = (1,)
    budget: int | None = None
    new_tokens: int = 32
    repeats: int = 3
    filled: bool = False
    implementation: str | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("contexts", "batch_sizes"):
            if not getattr(self, name):
                raise UserError(f"--{name}: at least one is needed")
            for value in getattr(self, name):
                require_positive(f"--{name}", value)
        for name in ("new_tokens", "repeats"):
            require_positive(f"--{name}", getattr(self, name))
        if self.budget is not None:
            require_positive("--budget", self.budget)

    @property
    def draws(self) -> int:
        """Of a sequence: prefill's, one that warms up, and the timed ones."""
        return 2 + 2 * self.new_tokens

    def policies(self, model: ModelConfig, methods: Methods) -> dict[str, Method]:
        """By name. Raises UserError for an unknown one, one that does not fit the model or the
        shortest context, or that needs the prompt which is not there."""
        found = {}
        own = [name for name in methods.usual if name != DENSE][:1]
        for name in self.methods or (DENSE, *own):
            budget = methods.budget if self.budget is None else self.budget
            budget = None if name == DENSE else budget
            if budget is not None and budget > min(self.contexts):
                raise UserError(
                    f"a budget of {budget} tokens is above the context of {min(self.contexts)}"
                )
            policy = methods.build(name, budget)
            policy.check(model, None, min(self.contexts))
            if self.filled and policy.learns:
                raise UserError(f"{name} learns from the prompt: it cannot be timed with --filled")
            found[name] = policy
        return found


def random_params(model: ModelConfig, seed: int) -> transformer.Params:
    """A model at random as decoding wants it (`lm.generate.prepare`), made on the device."""

    @functools.partial(jax.jit, static_argnums=1)
    def leaf(key, shape):
        scale = 1.0 if len(shape) < 3 else model.embed_dim**-0.5
        return scale * jax.random.normal(key, shape, jnp.dtype(model.dtype))

    shapes = transformer.abstract(model)[1]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [leaf(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return generate.prepare(model, jax.tree.unflatten(tree, made))


def layers_that_fit(model: ModelConfig, shadow: str, tokens: int, memory: int) -> int:
    """How many of the model's layers fit into `memory` bytes with caches of `tokens` tokens (and
    their 8-bit shadow, "" for none), in all sequences together. Raises UserError when not one
    does."""
    size = jnp.dtype(model.dtype).itemsize
    one, two = (
        size * transformer.count_parameters(dataclasses.replace(model, num_layers=n))
        for n in (1, 2)
    )
    per_token = 2 * size * model.head_dim + (model.head_dim + 4 if shadow else 0)
    layer = two - one + tokens * model.num_kv_heads * per_token
    room = (1 - SLACK) * memory - (2 * one - two)
    count = min(int(room // layer), model.num_layers)
    if count < 1:
        raise UserError(
            f"not one layer fits: {layer / hardware.GIB:.1f} GiB with its cache of {tokens} tokens"
        )
    return count


def benchmark(
    model: ModelConfig,
    params: transformer.Params,
    methods: Methods,
    options: Options = Options(),
    valid_vocab: int | None = None,
) -> Iterator[Row]:
    """Rows as they come, one per context, batch size and method; `over_dense` is how many times as
    fast as dense a step is and `agreement` how far the text is its own, where dense was measured;
    `cache_bytes` are of keys and values while decoding; `implementations` are those that each op
    has been traced with so far. Raises UserError."""
    policies = options.policies(model, methods)
    params = generate.prepare(model, params)
    cells = [(n, b) for n in options.contexts for b in options.batch_sizes]
    with Progress("benchmark", len(cells)) as progress:
        for context, batch in cells:
            runs = [
                _Run(name, policy, model, params, context, batch, options, valid_vocab)
                for name, policy in policies.items()
            ]
            for _ in range(options.repeats):
                for run in runs:
                    run.once()
            rows = [run.row() for run in runs]
            ops = dispatch.served()
            dense = {row["method"]: row["tpot_ms_p50"] for row in rows}.get(DENSE)
            wanted = next((run.tokens for run in runs if run.name == DENSE), None)
            for run, row in zip(runs, rows, strict=True):
                mine = row["tpot_ms_p50"]
                row["over_dense"] = dense / mine if dense and mine else None
                row["agreement"] = None if dense is None or run.failed else _same(run, wanted)
                row["implementations"] = ops
                say(_line(row))
                yield row
            progress.advance()


def _same(run: "_Run", wanted: np.ndarray) -> float:
    """Mean agreement of what was written with what dense attention wrote."""
    pairs = zip(run.tokens, wanted, strict=True)
    return float(np.mean([quality.agreement(*pair) for pair in pairs][: run.batch]))


def _line(row: Row) -> str:
    about = f"{row['method']}, {row['context']} tokens, batch {row['batch']}: "
    if "failed" in row:
        return about + row["failed"]
    first = "" if row["ttft_ms"] is None else f"first token {row['ttft_ms']:.1f} ms, "
    return about + f"{first}{row['tpot_ms_p50']:.3g} ms a token, {row['tokens_per_s']:.4g} tokens/s"


class _Run:
    """A method at one context and batch size, compiled."""

    def __init__(self, name, policy, model, params, context, batch, options, valid_vocab):
        self.name, self.policy, self.params, self.options = name, policy, params, options
        self.context, self.batch, self.failed = context, batch, ""
        self.tokens = np.zeros((batch, 0), np.int32)  # what it wrote
        self.first: list[float] = []
        self.steps: list[float] = []
        self.through: list[float] = []
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=options.draws)
        rng = np.random.default_rng(options.seed)
        vocabulary = valid_vocab or model.vocab_size
        prompts = rng.integers(0, vocabulary, (batch, context)).astype(np.int32)
        program = Program(
            model,
            sampling,
            policy,
            implementation=options.implementation,
            valid_vocab=valid_vocab,
        )
        key = jax.random.key(options.seed)
        self.program, arguments = decode.request(
            program, list(prompts), (), key, context + options.draws
        )
        self.arguments = jax.device_put(arguments)
        self.drafts: list[float] = []
        try:
            self._compile()
        except jax.errors.JaxRuntimeError as error:
            self._note(error)

    def _compile(self) -> None:
        stops, program = self.arguments.stop_ids, self.program
        start = filled if self.options.filled else decode.prefill
        ready = self.policy.ahead(program, self.params, self.arguments)
        lowered = start.lower(program, self.params, *ready)
        state = lowered.out_info
        held = jax.tree.leaves(state.cache.buffers)
        self.cache_bytes = sum(x.size * x.dtype.itemsize for x in held)
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        self.start = lowered.compile()
        advance = decode.advance.lower(program, self.params, state, stops, scalar)
        self.advance = advance.compile()

    def _note(self, error: Exception) -> None:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise error
        self.failed = "out of device memory"

    def once(self) -> None:
        """One prompt, then steps one by one, then as many in one go."""
        if self.failed:
            return
        try:
            self._once()
        except jax.errors.JaxRuntimeError as error:
            self._note(error)

    def _once(self) -> None:
        new = self.options.new_tokens
        began = time.perf_counter()
        ready = self.policy.ahead(self.program, self.params, self.arguments)
        jax.block_until_ready(ready)
        self.drafts.append(time.perf_counter() - began)
        state = jax.block_until_ready(self.start(self.params, *ready))
        self.first.append(time.perf_counter() - began)
        state, _ = self._advanced(state, 2)
        for limit in range(3, 3 + new):
            state, seconds = self._advanced(state, limit)
            self.steps.append(seconds)
        state, seconds = self._advanced(state, 2 + 2 * new)
        self.through.append(seconds)
        self.tokens = np.asarray(state.tokens)

    def _advanced(self, state: LoopState, limit: int) -> tuple[LoopState, float]:
        began = time.perf_counter()
        state = self.advance(self.params, state, self.arguments.stop_ids, np.int32(limit))
        return jax.block_until_ready(state), time.perf_counter() - began

    def row(self) -> Row:
        """Medians; times are None where the method did not run."""
        row: Row = {"kind": "decode", "method": self.name, "context": self.context}
        row |= dict.fromkeys(("ttft_ms", "tpot_ms_p50", "tpot_ms_p95", "tokens_per_s"))
        row["peak_bytes"] = None
        if self.failed:
            row["failed"] = self.failed
        else:
            if not self.options.filled:
                row["ttft_ms"] = 1e3 * statistics.median(self.first)
            if self.policy.drafts:
                row["draft_ms"] = 1e3 * statistics.median(self.drafts)  # of the first token's time
            row["tpot_ms_p50"], row["tpot_ms_p95"] = (
                1e3 * float(x) for x in np.percentile(self.steps, [50, 95])
            )
            tokens = self.batch * self.options.new_tokens
            row["tokens_per_s"] = tokens / statistics.median(self.through)
            programs = self.start, self.advance
            row["peak_bytes"] = max(map(hardware.compiled_bytes, programs))
            row["cache_bytes"] = self.cache_bytes
        return row | {
            "batch": self.batch,
            "budget": self.policy.limit,
            "prompt": "filled" if self.options.filled else "random tokens",
            "new_tokens": self.options.new_tokens,
            "repeats": self.options.repeats,
            "layers": self.program.model.num_layers,
            "seed": self.options.seed,
        }


@functools.partial(jax.jit, static_argnums=0)
def filled(
    program: Program,
    params: transformer.Params,
    tokens: jax.Array,  # [B, P] int32
    lengths: jax.Array,  # [B] int32
    indices: jax.Array,  # [B] int32
    stop_ids: jax.Array,  # [stops] int32
    key: jax.Array,  # []
    rows: None = None,
    places: None = None,
) -> LoopState:
    """What `decode.prefill` of the same arguments gives but for its numbers: keys and values are
    standard normal, and the first token is the prompt's last one."""
    del stop_ids
    if rows is not None or places is not None:
        raise ValueError("a filled cache has no rows after a prompt, and positions as they lie")
    model, B, new = program.model, len(lengths), program.sampling.max_new_tokens
    shape = (1, program.capacity, model.num_kv_heads, model.head_dim)
    held = decode.empty(program, B)

    def body(number, buffers):
        # a sequence of a layer at a time: drawn at once, all would need their memory twice
        layer, sequence = number // B, number % B
        pair = jax.random.split(jax.random.fold_in(key, number))
        k, v = (jax.random.normal(one, shape, jnp.dtype(model.dtype)) for one in pair)
        new = cache.Buffers(k, v)
        if buffers.codes is not None:
            new = cache.Buffers(k, v, *cache.shadow(k, buffers.codes.dtype))
        return cache.Buffers(
            *(
                None
                if whole is None
                else jax.lax.dynamic_update_slice(
                    whole,
                    rows[None].astype(whole.dtype),
                    (layer, sequence) + (0,) * (whole.ndim - 2),
                )
                for whole, rows in zip(buffers, new, strict=True)
            )
        )

    buffers = jax.lax.fori_loop(0, model.num_layers * B, body, held.buffers)
    held = Held(buffers, held.policy, held.reads)
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths, 1)[:, None] - 1, axis=1)[:, 0]
    return LoopState(
        cache=Cache(held.buffers, lengths, program.policy.rope),
        policy=held.policy,
        reads=held.reads,
        guard=None if program.policy.guard is None else Report.empty(B),
        keys=jax.vmap(lambda index: jax.random.fold_in(key, index))(indices),
        last=last,
        tokens=jnp.zeros((B, new), jnp.int32),
        log_probs=jnp.zeros((B, new), jnp.float32),
        counts=jnp.ones(B, jnp.int32),
        stopped=jnp.zeros(B, bool),
        done=lengths == 0,
        step=jnp.ones((), jnp.int32),
        steps=jnp.zeros(B, jnp.int32),
    )
