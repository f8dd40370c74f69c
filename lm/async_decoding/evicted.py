# SPDX-License-Identifier: Apache-2.0
"""A pool that begins with a thinned prompt: all of it goes through the model once, and every layer
keeps what an evictor of `lm.long_context.eviction` chooses. Threads then read less, whoever they
are.

A method may have another model look at the prompt first (`Method.ahead`), whose tokens then vote on
what is kept. What is kept keeps its key at its true position. The pool has one list of slots per
request, so every KV head has to keep as many entries as the others.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import generate
from lm.async_decoding.composed import Composition
from lm.async_decoding.decode import Program
from lm.async_decoding.pool import Pool
from lm.config import SamplingConfig
from lm.errors import UserError
from lm.long_context import program as long_context
from lm.long_context.eviction import EVICTORS, layer_major
from lm.long_context.eviction.evictor import Evictor
from lm.long_context.policy import Method
from lm.long_context.program import Request
from lm.transformer import Params


def build(name: str, budget: int) -> Evictor:
    """An evictor that keeps `budget` tokens. Raises UserError for one that a pool cannot hold."""
    if name not in EVICTORS:
        raise UserError(f"{name!r} is not one of {', '.join(uniform())}")
    found = EVICTORS[name](budget)
    if not found.uniform:
        raise UserError(f"{name}: heads keep unequal numbers of tokens, which a pool cannot hold")
    return found


@functools.cache
def uniform() -> tuple[str, ...]:
    """The evictors that `build` takes."""
    return tuple(name for name, make in EVICTORS.items() if make(64).uniform)


@dataclasses.dataclass(frozen=True)
class Thinned(Composition):
    """What `method` keeps of a prompt: an evictor, or one with a draft of its own.

    stop_ids: end what a draft writes.
    """

    method: Method
    stop_ids: tuple[int, ...] = ()

    @property
    def budget(self) -> int:
        return self.method.limit or 1

    def ahead(self, program: Program, params: Params, tokens: Any, lengths: Any) -> tuple[Any, ...]:
        self.method.check(program.model, program.sharding, None)
        static = self._static(program)
        whole, _ = layer_major.extended(static, np.asarray(tokens), np.asarray(lengths), None)
        indices = np.arange(len(lengths), dtype=np.int32)
        stops, key = generate.pad_stops(self.stop_ids), jax.random.key(0)
        request = Request(whole, np.asarray(lengths), indices, stops, key)
        found = self.method.ahead(static, params, request)
        arguments = found.tokens, found.lengths
        return arguments if found.rows is None else (*arguments, found.rows)

    def prefill(self, program, params, *arguments):
        tokens, lengths, *rows = arguments
        static = self._static(program)
        made = layer_major.prefill(static, params, tokens, lengths, rows[0] if rows else None)
        logits, held = made
        k, v = (jnp.swapaxes(x, 2, 3) for x in (held.buffers.k, held.buffers.v))
        owners = jnp.zeros((tokens.shape[0], program.capacity), jnp.int32)
        return logits, Pool(k, v, owners), held.buffers.counts[0, :, 0]

    def _static(self, program: Program) -> long_context.Program:
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=program.rules.max_tokens)
        keeps = self.method.inner(sampling)
        if not isinstance(keeps, Evictor) or not keeps.uniform:
            raise UserError("heads keep unequal numbers of tokens, which a pool cannot hold")
        return long_context.Program(
            program.model,
            sampling,
            keeps,
            program.capacity,
            implementation=program.implementation,
            valid_vocab=program.valid_vocab,
        )
