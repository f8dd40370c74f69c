# SPDX-License-Identifier: Apache-2.0
"""The model that drafts: what comes after a prompt, and which of its tokens the draft looked at.

One forward pass over the prompts and one jitted loop give both: the draft's tokens, from its own
dense cache, and the importance that a `Watch` makes of its attention on the way. Nothing of the
draft's cache stays, unless it is to go on drafting.
"""

import dataclasses
import functools
import pathlib
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lm import contexts, generate, prompting, sampling, setup, transformer, tuned
from lm.config import ModelConfig, SamplingConfig
from lm.draft_inference.watch import Watch, Watching
from lm.errors import UserError
from lm.hf import weights
from lm.long_context.eviction.snapkv import SnapKV
from lm.long_context.program import Program, Request
from lm.sharding import Sharding
from lm.transformer import Params

OWN = 2**31 - 1  # folded into the key: a draft's draws are not the target's


class Lookahead(NamedTuple):
    """What a draft found out about prompts."""

    tokens: jax.Array  # [B, L] int32, anything from counts on
    counts: jax.Array  # [B] int32: an end of text is one of them
    importance: jax.Array | None  # [B, P] float32, at least 0; 0 beyond a prompt
    cache: contexts.Cache | None = None  # of prompts and all drafted tokens but the last


class Writer(NamedTuple):
    """A model that can go on drafting from its cache."""

    model: ModelConfig
    params: Params  # maybe with more layers than the model's
    valid_vocab: int | None


class Drafter(Protocol):
    """Anything that drafts: compared by value or identity, with a `repr` that tells it apart."""

    def check(self, target: ModelConfig) -> None:
        """Raises UserError, in one line, when it cannot draft for this target."""

    def depth(self, target: ModelConfig) -> int:
        """Layers that it has."""

    def look(
        self,
        program: Program,
        params: Params,
        request: Request,
        tokens: int,
        watch: Watch | None,
        room: int = 0,
    ) -> Lookahead:
        """Drafts at most `tokens` tokens after every prompt.

        Args:
          program, params: of the target.
          request: prompts [B, P], without room for extra rows.
          watch: which of its attention becomes `importance`; None: none.
          room: the cache stays, with slots for so many tokens behind a prompt; 0: it does not.
        """

    def writer(self, program: Program, params: Params) -> Writer | None:
        """What goes on drafting from that cache; None: nothing can, and `room` is refused."""


@dataclasses.dataclass(frozen=True)
class _Looking:
    """All that is static in the compiled function."""

    model: ModelConfig
    sampling: SamplingConfig
    tokens: int
    watch: Watch | None
    sharding: Sharding | None
    implementation: str | None
    valid_vocab: int | None
    room: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Draft:
    """A model of its own that reads the target's tokens."""

    model: ModelConfig
    params: Params  # in the compute dtype
    valid_vocab: int | None
    tokenizer: str  # its fingerprint; "": not known
    digest: str  # of the parameters
    positions: int | None = None  # it was made for so many tokens at most; None: not known
    _meshes: dict[Sharding | None, Params] = dataclasses.field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        return f"Draft({self.digest[:16]}, {self.model.dtype})"

    @property
    def vocabulary(self) -> int:
        return self.valid_vocab or self.model.vocab_size

    def check(self, target: ModelConfig) -> None:
        if self.vocabulary > target.vocab_size:
            raise UserError(
                f"the draft has {self.vocabulary} tokens, the target {target.vocab_size}: "
                "they must have one vocabulary"
            )

    def depth(self, target: ModelConfig) -> int:
        del target
        return self.model.num_layers

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raises UserError where the target's tokenizer is another."""
        if self.tokenizer and self.tokenizer != fingerprint:
            raise UserError("draft and target have different tokenizers: their tokens differ")

    def writer(self, program: Program, params: Params) -> Writer:
        del params
        return Writer(self.model, self._placed(program.sharding), self.valid_vocab)

    def look(
        self,
        program: Program,
        params: Params,
        request: Request,
        tokens: int,
        watch: Watch | None,
        room: int = 0,
    ) -> Lookahead:
        del params
        real = program.valid_vocab or program.model.vocab_size
        if self.vocabulary != real:
            raise UserError(
                f"the draft has {self.vocabulary} tokens, the target {real}: "
                "they must have one vocabulary"
            )
        longest = int(np.asarray(request.lengths).max())
        drafted = max(tokens, room)
        if self.positions is not None and longest + drafted > self.positions:
            raise UserError(
                f"a prompt of {longest} tokens and {drafted} drafted ones are beyond the "
                f"{self.positions} positions of the draft"
            )
        return looked(
            program,
            self.model,
            self._placed(program.sharding),
            request,
            tokens,
            watch,
            valid_vocab=self.valid_vocab,
            room=room,
        )

    def _placed(self, sharding: Sharding | None) -> Params:
        if sharding not in self._meshes:
            params = self.params
            if sharding is not None:
                params = jax.device_put(params, sharding.params(params))
            self._meshes[sharding] = generate.prepare(self.model, params)
        return self._meshes[sharding]


@dataclasses.dataclass(frozen=True)
class FirstLayers:
    """The target's own first layers, with its final norm and output matrix: no other model."""

    layers: int

    def check(self, target: ModelConfig) -> None:
        if not 1 <= self.layers <= target.num_layers:
            raise UserError(
                f"{self.layers} layers cannot draft for a target of {target.num_layers}"
            )

    def depth(self, target: ModelConfig) -> int:
        del target
        return self.layers

    def writer(self, program: Program, params: Params) -> Writer:
        model = dataclasses.replace(program.model, num_layers=self.layers)
        return Writer(model, params, program.valid_vocab)

    def look(
        self,
        program: Program,
        params: Params,
        request: Request,
        tokens: int,
        watch: Watch | None,
        room: int = 0,
    ) -> Lookahead:
        model, _, valid = self.writer(program, params)
        return looked(program, model, params, request, tokens, watch, valid_vocab=valid, room=room)


@dataclasses.dataclass(frozen=True)
class FromKept:
    """The target itself, drafting from what `policy` keeps of the prompt; subclasses say how."""

    policy: SnapKV

    def depth(self, target: ModelConfig) -> int:
        return target.num_layers

    def writer(self, program: Program, params: Params) -> None:
        del program, params  # what it drafted from is gone

    def slots(self, prompt: int, tokens: int) -> int:
        """Of a kept list, for prompts that are padded to `prompt` tokens."""
        return -(-(min(self.policy.budget, prompt) + tokens) // 64) * 64

    def program(self, program: Program, prompt: int, tokens: int) -> Program:
        """The target's, for `tokens` tokens after such prompts."""
        drawn = dataclasses.replace(program.sampling, max_new_tokens=tokens)
        capacity = self.slots(prompt, tokens)
        return dataclasses.replace(program, policy=self.policy, sampling=drawn, capacity=capacity)


def load(path: str | pathlib.Path, *, dtype: str | None = None) -> Draft:
    """The newest checkpoint of a run, or a Hugging Face directory. Raises UserError."""
    path = pathlib.Path(path)
    hf = setup.is_hf(path)
    speaker = (prompting.load_hf if hf else prompting.load_workdir)(path, dtype=dtype)
    known = weights.read_fields(path).get("max_position_embeddings") if hf else None
    return of_speaker(speaker, positions=known if isinstance(known, int) else None)


def of_speaker(speaker: prompting.Speaker, positions: int | None = None) -> Draft:
    """A model that can be talked to, as a draft."""
    # a run that began from another's checkpoint does not tell what of the table is padding
    real = min(speaker.valid_vocab or speaker.model.vocab_size, speaker.tokenizer.vocab_size)
    return Draft(
        speaker.model,
        speaker.params,
        real if real < speaker.model.vocab_size else None,
        speaker.tokenizer.fingerprint,
        tuned.digest(speaker.params),
        positions,
    )


def looked(
    program: Program,
    model: ModelConfig,
    params: Params,
    request: Request,
    tokens: int,
    watch: Watch | None,
    *,
    valid_vocab: int | None,
    room: int = 0,
) -> Lookahead:
    """What a model with these parameters drafts, drawn as the target draws; of `params` only the
    model's first layers are read. One program for all prompts of a bucket."""
    static = _Looking(
        model,
        dataclasses.replace(program.sampling, max_new_tokens=max(tokens, 1)),
        tokens,
        watch,
        program.sharding,
        program.implementation,
        valid_vocab,
        room,
    )
    arguments = request.tokens, request.lengths, request.indices, request.stop_ids, request.key
    return _look(static, params, *arguments)


class _State(NamedTuple):
    """The loop's state."""

    cache: contexts.Cache
    seen: jax.Array  # [B, P] float32: joined over the prompt and the steps
    votes: jax.Array  # [B] int32: the prompt and the steps that voted
    last: jax.Array  # [B] int32
    tokens: jax.Array  # [B, L] int32
    counts: jax.Array  # [B] int32
    done: jax.Array  # [B] bool
    step: jax.Array  # [] int32: tokens drawn


@functools.partial(jax.jit, static_argnums=0)
def _look(static: _Looking, params, tokens, lengths, indices, stop_ids, key) -> Lookahead:
    model, watch, count = static.model, static.watch, static.tokens
    params = first_layers(model, params)
    keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(key, OWN), index))(indices)

    def drawn(states: jax.Array, state: _State) -> _State:
        logits = transformer.logits(model, params, states)
        return _drawn(static, logits, keys, stop_ids, state)

    def step(state: _State) -> _State:
        context = contexts.Decode(state.cache, static.sharding, static.implementation)
        place = state.cache.lengths[:, None]
        run = _pass(static, params, state.last[:, None], place, context, lengths, state.seen)
        states, context, seen = run
        new = state._replace(cache=context.advanced((~state.done).astype(jnp.int32)))
        if watch is not None:
            voting = ~state.done & (state.step <= watch.steps(count))
            seen = jnp.where(voting[:, None], seen, 0.0)
            both = state.seen + seen if watch.join == "mean" else jnp.maximum(state.seen, seen)
            new = new._replace(seen=both, votes=state.votes + voting)
        return drawn(states[:, 0], new)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < count) & ~jnp.all(state.done)

    states, state = _start(static, params, tokens, lengths)
    if count:
        state = jax.lax.while_loop(unfinished, step, drawn(states, state))
    seen = state.seen
    if watch is not None and watch.join == "mean":
        seen = seen / state.votes[:, None]
    found = state.tokens, state.counts, seen
    if static.sharding is not None:
        found = tuple(static.sharding.constrain(x, *[None] * x.ndim) for x in found)
    cache = state.cache if static.room else None
    return Lookahead(found[0], found[1], None if watch is None else found[2], cache)


def first_layers(model: ModelConfig, params: Params) -> Params:
    """The parameters of a model's own layers, of those of a deeper one."""
    own, first = params["layers"], slice(model.num_layers)
    if not isinstance(own, tuple):
        return {**params, "layers": jax.tree.map(lambda x: x[first], own)}
    return {**params, "layers": own[first]}


def _start(static: _Looking, params, tokens, lengths) -> tuple[jax.Array, _State]:
    """States [B, D] of the prompts' last tokens, and the loop's state before the first draw."""
    (B, P), count = tokens.shape, static.tokens
    slots = -(-(P + max(count, static.room)) // 64) * 64
    cache = contexts.Cache.empty(static.model, B, slots)
    context = contexts.Prefill(cache, lengths, static.sharding, static.implementation)
    positions = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[None], (B, P))
    nothing = jnp.zeros((B, P), jnp.float32)
    states, context, seen = _pass(static, params, tokens, positions, context, lengths, nothing)
    row = jnp.maximum(lengths, 1)[:, None, None] - 1
    state = _State(
        context.cache,
        seen,
        jnp.ones(B, jnp.int32),
        jnp.zeros(B, jnp.int32),
        jnp.zeros((B, count), jnp.int32),
        jnp.zeros(B, jnp.int32),
        lengths == 0,
        jnp.zeros((), jnp.int32),
    )
    return jnp.take_along_axis(states, row, axis=1)[:, 0], state


def _pass(static: _Looking, params, tokens, positions, context, lengths, like):
    """(states, context, what was seen, as `like` [B, P]) of a forward pass."""
    if static.watch is None:
        states, context = transformer.hidden(static.model, params, tokens, positions, context)
        return states, context, like
    made = Watching(context, jnp.zeros_like(like), lengths, static.watch)
    states, made = transformer.hidden(static.model, params, tokens, positions, made)
    return states, made.context, made.seen


def _drawn(static: _Looking, logits, keys, stop_ids, state: _State) -> _State:
    """With one more token of every sequence that is not done."""
    number = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, state.step)
    token = sampling.sample(logits, static.sampling, number, static.valid_vocab)
    token = jnp.where(state.done, 0, token)
    stop = jnp.any(token[:, None] == stop_ids[None], axis=1)
    return state._replace(
        last=token,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        counts=state.counts + ~state.done,
        done=state.done | stop,
        step=state.step + 1,
    )
