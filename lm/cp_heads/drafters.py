# SPDX-License-Identifier: Apache-2.0
"""What proposes tokens to a target model. Every method of the benchmark is one of these, so that
all of them share the loop, the verification and the counters."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lm import sampling as draws
from lm import transformer
from lm.config import ModelConfig, SamplingConfig
from lm.cp_heads import draft, head
from lm.cp_heads.draft import Draft
from lm.cp_heads.head import HeadConfig
from lm.errors import UserError
from lm.sharding import Sharding
from lm.transformer import Params


@dataclasses.dataclass(frozen=True)
class Target:
    """The model that decides, and how it is drawn from: static in every program."""

    model: ModelConfig
    sampling: SamplingConfig
    sharding: Sharding | None = None
    implementation: str | None = None
    valid_vocab: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Known:
    """What a cycle starts from."""

    states: jax.Array  # [B, D], of the last token that is in the cache
    last: jax.Array  # [B] int32, the token after it: emitted, but not yet in the cache
    lengths: jax.Array  # [B] int32, tokens in the cache


class Drafter(Protocol):
    """Static and hashable; weights and state are passed beside it."""

    @property
    def chains(self) -> int:
        """C: drafts of one cycle that share the root."""

    @property
    def length(self) -> int:
        """n: tokens of each draft."""

    def check(self, target: Target) -> None:
        """Raises UserError, in one line, when it cannot draft for this target."""

    def start(
        self, target: Target, weights: Any, tokens: jax.Array, lengths: jax.Array, capacity: int
    ) -> Any:
        """Its own state after the prompts: tokens [B, T] padded on the right, lengths [B]."""

    def draft(
        self,
        target: Target,
        params: Params,
        weights: Any,
        state: Any,
        known: Known,
        keys: jax.Array,  # [B] keys
    ) -> tuple[Draft, Any]:
        """Proposes, and the state with it."""

    def keep(self, state: Any, known: Known, tokens: jax.Array, count: jax.Array) -> Any:
        """The state when `count` [B] of the fed tokens (the last one, then those kept of the draft
        `tokens` [B, n]) are in the target's cache; 0 where a sequence stands still."""


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """Drafts nothing: a trunk call for every token."""

    chains: int = 1
    length: int = 0

    def check(self, target: Target) -> None:
        pass

    def start(self, target, weights, tokens, lengths, capacity):
        return ()

    def draft(self, target, params, weights, state, known, keys):
        B = known.last.shape[0]
        log_q = None
        if not draws.is_greedy(target.sampling):
            log_q = jnp.zeros((B, 1, 0, target.model.vocab_size), jnp.float32)
        return Draft(jnp.zeros((B, 1, 0), jnp.int32), log_q), state

    def keep(self, state, known, tokens, count):
        return state


@dataclasses.dataclass(frozen=True)
class Heads:
    """A CP head on the target's own hidden states; weights are the head's parameters."""

    config: HeadConfig
    chains: int = 1

    @property
    def length(self) -> int:
        return self.config.predicted - 1

    def check(self, target: Target) -> None:
        head.check(self.config, target.model)
        if not 1 <= self.chains <= self.config.rank:
            raise UserError(
                f"{self.chains} draft chains: a head of rank {self.config.rank} gives 1 to "
                f"{self.config.rank}"
            )
        if self.chains > 1 and not self.length:
            raise UserError("a tree of drafts needs a head that predicts at least 2 tokens")

    def start(self, target, weights, tokens, lengths, capacity):
        return ()

    def draft(self, target, params, weights, state, known, keys):
        table = transformer.unembedding(target.model, params)
        factors = draft.factors(
            weights, self.config, target.model, known.states, table, target.valid_vocab
        )
        return draft.propose(factors, known.last, target.sampling, keys, self.chains), state

    def keep(self, state, known, tokens, count):
        return state
