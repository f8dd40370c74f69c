# SPDX-License-Identifier: Apache-2.0
"""What the papers hand to each other where they are put together: no room of a paper knows another,
so that commands get the parts of a composition here."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from lm import train, tuned
from lm.async_decoding.compositions import Makers
from lm.async_decoding.drafting import Proposer
from lm.config import ModelConfig, SamplingConfig, to_dict
from lm.cp_heads import attach, decode, speaking
from lm.cp_heads.drafters import Heads, Known, Target
from lm.draft_inference import pipeline
from lm.draft_inference.config import DraftSettings
from lm.draft_inference.methods import Methods
from lm.draft_inference.proposals import Opener, Proposals
from lm.errors import UserError
from lm.long_context import asking
from lm.long_context.policy import Method
from lm.progress import say
from lm.prompting import Speaker
from lm.token_select import methods as selections
from lm.token_select.config import SelectConfig
from lm.transformer import Params

_CHUNK = 256  # of a prompt from which every step selects


@dataclasses.dataclass(frozen=True)
class Parts:
    """Where the parts come from.

    draft: a workdir or a Hugging Face directory of a draft model; "": none.
    draft_layers: instead of it, the model's own first layers draft.
    draft_tokens: at most, that vote.
    select_init, select_local: first and last tokens of a prompt that a selection always reads.
    heads: a workdir or a Hugging Face directory with a CP head; "": none.
    """

    draft: str = ""
    draft_layers: int = 0
    draft_tokens: int = 32
    select_init: int = SelectConfig.n_init
    select_local: int = SelectConfig.n_local
    heads: str = ""


@dataclasses.dataclass(frozen=True)
class Chain:
    """Tokens by a CP head, one after the other: the most likely ones, unless it is said how they
    are drawn."""

    target: Target
    drafter: Heads

    @property
    def length(self) -> int:
        return self.drafter.length

    def check(self, model: ModelConfig) -> None:
        """Raises UserError for a model that it was not made for."""
        (vocab, width), own = (model.vocab_size, model.embed_dim), self.target.model
        if (vocab, width) != (own.vocab_size, own.embed_dim):
            raise UserError(
                f"the head is for {own.vocab_size} tokens and width {own.embed_dim}, the model has "
                f"{vocab} and {width}"
            )

    def __call__(
        self,
        params: Params,
        weights: Any,
        states: jax.Array,
        last: jax.Array,
        sampling: SamplingConfig | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        target, known = self.target, Known(states, last, jnp.zeros_like(last))
        if sampling is None:
            keys = jax.random.split(jax.random.key(0), len(last))  # nothing is drawn
        else:
            target = dataclasses.replace(target, sampling=sampling)
        given = target, params, weights, (), known, keys
        return self.drafter.draft(*given)[0].tokens[:, 0]


def makers(speaker: Speaker, parts: Parts) -> Makers:
    """For a model that answers. Raises UserError for settings that contradict each other."""
    settings = DraftSettings(
        path=parts.draft, layers=parts.draft_layers, lookahead=parts.draft_tokens
    )
    select = SelectConfig(
        n_init=parts.select_init,
        n_local=parts.select_local,
        chunk=_CHUNK,
        prefill="dense",  # a step's reading is what is composed; a prompt is read once
        rope="write",  # rows stand at several positions
        positions="true",
    )

    def spec_kv(budget: int) -> Method:
        draft = pipeline.opened(settings, speaker, speaker.model.dtype)
        return Methods(settings=settings, draft=draft).make("speckv", budget)

    def token_select(budget: int) -> Method:
        return selections.Methods(select).make(selections.OWN, budget)

    def cp_heads() -> tuple[Proposer, Any]:
        return _head(speaker, parts.heads)[1:]

    named = bool(parts.draft or parts.draft_layers)
    return Makers(
        spec_kv=spec_kv if named else None,
        token_select=token_select,
        cp_heads=cp_heads if parts.heads else None,
        stop_ids=tuple(speaker.stop_ids),
    )


def chain(speaker: Speaker, drafter: Heads, weights: Any) -> tuple[Chain, Any]:
    """A head as what drafts for a model, and its weights. Raises UserError for one that does not
    fit, or predicts a single token."""
    target = Target(speaker.model, SamplingConfig(temperature=0.0), valid_vocab=speaker.valid_vocab)
    drafter.check(target)
    if drafter.chains > 1 or not drafter.length:
        raise UserError("drafts are one chain each, by a head that predicts 2 tokens or more")
    return Chain(target, drafter), decode.prepare(target, weights)


def proposals(path: str) -> Opener:
    """What opens the head in a workdir or a Hugging Face directory as a target's own draft."""
    return functools.partial(_proposals, path=path)


def _proposals(speaker: Speaker, path: str) -> Proposals:
    loaded, proposer, weights = _head(speaker, path)
    if tuned.digest(loaded.speaker.params) != tuned.digest(speaker.params):
        say(f"the head in {path} was trained with other weights than the target's")
    digest = asking.fingerprint([train.params_sha256(loaded.head), to_dict(loaded.config)])
    return Proposals(proposer, weights, f"heads:{path}", digest)


def _head(speaker: Speaker, path: str) -> tuple[speaking.Drafting, Chain, Any]:
    """A head with its own model, and as what drafts for another. Raises UserError for one of
    another tokenizer or shape."""
    loaded = speaking.load(pathlib.Path(path), dtype=speaker.model.dtype)
    if loaded.speaker.tokenizer.fingerprint != speaker.tokenizer.fingerprint:
        raise UserError(f"{path}: its head drafts tokens of another tokenizer")
    attach.check_shapes(loaded.head, loaded.config, speaker.model, path)
    return loaded, *chain(speaker, Heads(loaded.config), loaded.head)
