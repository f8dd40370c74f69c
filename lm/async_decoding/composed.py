# SPDX-License-Identifier: Apache-2.0
"""The seam between the threaded loop and a method that it is put together with: what fills the pool
before the first token, and what a step is.

`begin` and `advance` are the two compiled pieces of every composition. What draws tokens is handed
in, as for `decode.step`, so that given programs can be forced through them; `pieces` makes them
draw as the decoder by itself does.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.async_decoding import decode, pool
from lm.async_decoding.decode import Choose, Forward, Loop, Program
from lm.async_decoding.tables import Tables
from lm.errors import UserError
from lm.transformer import Params


@dataclasses.dataclass(frozen=True)
class Composition:
    """The decoder by itself. Subclasses are static and compared by value; arrays of a method's own
    are passed beside them, as `weights`."""

    @property
    def budget(self) -> int:
        """Tokens that every prompt has at least."""
        return 1

    def ahead(self, program: Program, params: Params, tokens: Any, lengths: Any) -> tuple[Any, ...]:
        """The arguments of `prefill` for prompts [B, T] padded on the right, lengths [B]: whatever
        goes before it on the host, or by another model."""
        del program, params
        return tokens, lengths

    def prefill(
        self, program: Program, params: Params, *arguments: jax.Array
    ) -> tuple[jax.Array, Any, jax.Array | None]:
        """Logits [B, V] after every prompt, what the loop keeps as its pool, and the entries [B]
        that it holds of each prompt (None: one per token)."""
        made = {"sharding": program.sharding, "implementation": program.implementation}
        logits, filled = pool.prefill(
            program.model, params, *arguments, capacity=program.capacity, **made
        )
        return logits, filled, None

    def forward(self, program: Program, params: Params) -> Forward:
        """What a step's tokens give."""
        return decode.model_forward(program, params)

    def step(
        self,
        program: Program,
        params: Params,
        weights: Any,
        known: Tables,
        state: Loop,
        choose: Choose,
    ) -> Loop:
        """One step of every active thread."""
        del weights
        forward = self.forward(program, params)
        return decode.step(program.rules, known, state, forward, choose)[0]


# (program, what draws need, per request [B, ...]) -> what draws
MakeChoose = Callable[[Program, Any], Choose]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def begin(
    program: Program,
    composition: Composition,
    make: MakeChoose,
    params: Params,
    known: Tables,
    given: Any,
    *arguments: jax.Array,
) -> Loop:
    """The loop after the first token of every main thread; `given` is what `make` needs, and the
    arguments are those of `Composition.ahead`, the lengths second."""
    logits, filled, slots = composition.prefill(program, params, *arguments)
    every = jnp.pad(logits[:, None], ((0, 0), (0, program.rules.rows - 1), (0, 0)))
    lengths = arguments[1]
    state = decode.begin(program.rules, known, lengths, every, make(program, given), slots)
    return Loop(filled, state, given)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def advance(
    program: Program,
    composition: Composition,
    make: MakeChoose,
    params: Params,
    weights: Any,
    known: Tables,
    state: Loop,
    limit: jax.Array | np.ndarray | int,
) -> Loop:
    """Goes on until every request is done, or has taken `limit` steps."""
    choose = make(program, state.keys)

    def one(state: Loop) -> Loop:
        return composition.step(program, params, weights, known, state, choose)

    return jax.lax.while_loop(functools.partial(decode.unfinished, limit), one, state)


def drawing(program: Program, keys: jax.Array) -> Choose:
    """The decoder's own draws, by a key per request."""
    return functools.partial(decode.draw, program, keys)


def pieces(composition: Composition, weights: Any) -> decode.Pieces:
    """What `decode.answers` runs, under a composition; what starts a batch raises UserError on a
    mesh. A prompt that is shorter than what is kept of one is kept whole."""

    def start(program, params, known, tokens, lengths, indices, key) -> Loop:
        if program.sharding is not None:
            raise UserError("a composition runs on one device")
        # methods need not know what an empty prompt is: what fills up a batch is its first request
        own = np.where(lengths > 0, np.arange(len(lengths)), 0)
        tokens, lengths, indices = (np.asarray(x)[own] for x in (tokens, lengths, indices))
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
        arguments = composition.ahead(program, params, tokens, lengths)
        return begin(program, composition, drawing, params, known, keys, *arguments)

    def go_on(program, params, known, state: Loop, limit) -> Loop:
        return advance(program, composition, drawing, params, weights, known, state, limit)

    return decode.Pieces(start, go_on)
