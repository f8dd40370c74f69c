# SPDX-License-Identifier: Apache-2.0
"""What the papers hand to each other where they are put together: no room of a paper knows another,
so that commands get the parts of a composition here."""

import dataclasses

from lm.async_decoding.compositions import Makers
from lm.draft_inference import pipeline
from lm.draft_inference.config import DraftSettings
from lm.draft_inference.methods import Methods
from lm.long_context.policy import Method
from lm.prompting import Speaker
from lm.token_select import methods as selections
from lm.token_select.config import SelectConfig


@dataclasses.dataclass(frozen=True)
class Parts:
    """Where the parts come from.

    draft: a workdir or a Hugging Face directory of a draft model; "": none.
    draft_layers: instead of it, the model's own first layers draft.
    draft_tokens: at most, that vote.
    select_init, select_local: first and last tokens of a prompt that a selection always reads.
    """

    draft: str = ""
    draft_layers: int = 0
    draft_tokens: int = 32
    select_init: int = SelectConfig.n_init
    select_local: int = SelectConfig.n_local


def makers(speaker: Speaker, parts: Parts) -> Makers:
    """For a model that answers. Raises UserError for settings that contradict each other."""
    settings = DraftSettings(
        path=parts.draft, layers=parts.draft_layers, lookahead=parts.draft_tokens
    )

    def spec_kv(budget: int) -> Method:
        draft = pipeline.opened(settings, speaker, speaker.model.dtype)
        return Methods(settings=settings, draft=draft).make("speckv", budget)

    select = SelectConfig(
        n_init=parts.select_init,
        n_local=parts.select_local,
        chunk=min(SelectConfig.chunk, parts.select_local),
        rope="write",  # rows stand at several positions
        positions="true",
    )

    def token_select(budget: int) -> Method:
        return selections.Methods(select).make(selections.OWN, budget)

    named = bool(parts.draft or parts.draft_layers)
    return Makers(
        spec_kv=spec_kv if named else None,
        token_select=token_select,
        stop_ids=tuple(speaker.stop_ids),
    )
