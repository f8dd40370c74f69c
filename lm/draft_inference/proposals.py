# SPDX-License-Identifier: Apache-2.0
"""The target drafts for itself, several tokens in every pass: heads on its hidden states propose
what follows, so that no second model is needed.

As in LAQ++ the target reads a prompt once and keeps what SnapKV keeps. From the state of the last
token come the target's own next token and n more that the heads propose; where more are wanted,
those 1 + n are fed behind what was kept, in one pass, and the last one's state gives the next
block. So L tokens take ceil(L / (1 + n)) passes, that over the prompt included, in place of L.

Nothing is verified: that many passes are enough for every prompt of a batch, and drafted tokens
only vote on what the target keeps. Nothing is seen of its attention either, so methods that choose
by it take another draft.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lm import sampling, transformer
from lm.config import ModelConfig, SamplingConfig
from lm.draft_inference.draft import OWN, FromKept, Lookahead
from lm.draft_inference.watch import Watch
from lm.errors import UserError
from lm.long_context.eviction import layer_major
from lm.long_context.program import Held, Program, Request
from lm.prompting import Speaker
from lm.sharding import Sharding
from lm.transformer import Params


class Proposer(Protocol):
    """Static and hashable; its weights are passed beside it."""

    @property
    def length(self) -> int:
        """n, at least 1."""

    def check(self, model: ModelConfig) -> None:
        """Raises UserError, in one line, when it cannot propose for this model."""

    def __call__(
        self,
        params: Params,  # of the target
        weights: Any,
        states: jax.Array,  # [B, D], final-norm states, each before a token
        last: jax.Array,  # [B] int32, that token
        sampling: SamplingConfig,
        keys: jax.Array,  # [B] keys
    ) -> jax.Array:
        """Tokens [B, n] int32 that may follow, drawn as `sampling` says."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Proposals:
    """A proposer with its weights."""

    proposer: Proposer
    weights: Any  # in the compute dtype
    name: str  # as rows call it
    digest: str  # of the weights and of what they mean
    _meshes: dict[Sharding | None, Any] = dataclasses.field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        return f"Proposals({self.digest[:16]}, {self.proposer.length})"

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.weights))

    def placed(self, sharding: Sharding | None) -> Any:
        """The weights, whole on every device of a mesh."""
        if sharding is None:
            return self.weights
        if sharding not in self._meshes:
            self._meshes[sharding] = jax.device_put(self.weights, sharding.named())
        return self._meshes[sharding]


# what a target's own heads are; raises UserError where they are not this target's
Opener = Callable[[Speaker], Proposals]


@dataclasses.dataclass(frozen=True)
class InBlocks(FromKept):
    """By `proposals`."""

    proposals: Proposals

    def check(self, target: ModelConfig) -> None:
        self.proposals.proposer.check(target)

    def look(
        self,
        program: Program,
        params: Params,
        request: Request,
        tokens: int,
        watch: Watch | None,
        room: int = 0,
    ) -> Lookahead:
        if room:
            raise UserError("heads propose once, before the prompt is compressed")
        if watch is not None:
            raise UserError("heads propose tokens: nothing is seen of a draft's attention")
        B, P = request.tokens.shape
        if not tokens:
            return Lookahead(jnp.zeros((B, 0), jnp.int32), jnp.zeros(B, jnp.int32), None)
        program = self.program(program, P, tokens)
        static = _Looking(program, self.proposals.proposer, tokens)
        arguments = request.tokens, request.lengths, request.indices, request.stop_ids, request.key
        return _look(static, params, self.proposals.placed(program.sharding), *arguments)


@dataclasses.dataclass(frozen=True)
class _Looking:
    """All that is static in the compiled function."""

    program: Program
    proposer: Proposer
    tokens: int

    @property
    def block(self) -> int:
        """Tokens that a pass gives."""
        return 1 + self.proposer.length

    @property
    def passes(self) -> int:
        return -(-self.tokens // self.block)


class _State(NamedTuple):
    """The loop's state, after `step` passes."""

    held: Held
    block: jax.Array  # [B, 1 + n] int32: the last one, not yet fed
    tokens: jax.Array  # [B, passes (1 + n)] int32
    counts: jax.Array  # [B] int32
    done: jax.Array  # [B] bool
    step: jax.Array  # [] int32


@functools.partial(jax.jit, static_argnums=0)
def _look(static, params, weights, tokens, lengths, indices, stop_ids, key) -> Lookahead:
    program, block = static.program, static.block
    keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(key, OWN), index))(indices)

    def drawn(states: jax.Array, state: _State) -> _State:
        made = _proposed(static, params, weights, states, keys, state.step)
        made = jnp.where(state.done[:, None], 0, made)
        stops = jnp.any(made[..., None] == stop_ids[None, None], axis=-1).astype(jnp.int32)
        taken = jnp.sum(jnp.cumsum(stops, axis=1) - stops == 0, axis=1)  # the end is one of them
        return state._replace(
            block=made,
            tokens=jax.lax.dynamic_update_slice(state.tokens, made, (0, state.step * block)),
            counts=state.counts + jnp.where(state.done, 0, taken),
            done=state.done | (jnp.max(stops, axis=1) > 0),
            step=state.step + 1,
        )

    def more(state: _State) -> _State:
        number = (state.step - 1) * block + jnp.arange(block, dtype=jnp.int32)
        places = lengths[:, None] + number[None]
        rows = jnp.where(state.done, 0, block)
        states, held = layer_major.again(program, params, state.held, state.block, places, rows)
        return drawn(states[:, -1], state._replace(held=held))

    def unfinished(state: _State) -> jax.Array:
        return (state.step < static.passes) & ~jnp.all(state.done)

    B = len(lengths)
    states, held, _ = layer_major.evicted(program, params, tokens, lengths, None)
    last = jnp.maximum(lengths, 1)[:, None, None] - 1
    state = _State(
        held,
        jnp.zeros((B, block), jnp.int32),
        jnp.zeros((B, static.passes * block), jnp.int32),
        jnp.zeros(B, jnp.int32),
        lengths == 0,
        jnp.zeros((), jnp.int32),
    )
    state = drawn(jnp.take_along_axis(states, last, axis=1)[:, 0], state)
    state = jax.lax.while_loop(unfinished, more, state)
    found = state.tokens[:, : static.tokens], jnp.minimum(state.counts, static.tokens)
    if program.sharding is not None:
        found = tuple(program.sharding.constrain(x, *[None] * x.ndim) for x in found)
    return Lookahead(*found, None)


def _proposed(static: _Looking, params, weights, states, keys, step) -> jax.Array:
    """[B, 1 + n] int32 after states [B, D]: the target's own token, and what is proposed to follow
    it. Draws are numbered by the tokens' places."""
    program, number = static.program, step * static.block

    def numbered(number: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)

    logits = transformer.logits(program.model, params, states)
    first = sampling.sample(logits, program.sampling, numbered(number), program.valid_vocab)
    given = first, program.sampling, numbered(number + 1)
    after = static.proposer(params, weights, states, *given)
    return jnp.concatenate([first[:, None], after.astype(jnp.int32)], axis=1)
