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


@dataclasses.dataclass(frozen=True)
class Parts:
    """Where the parts come from.

    draft: a workdir or a Hugging Face directory of a draft model; "": none.
    draft_layers: instead of it, the model's own first layers draft.
    draft_tokens: at most, that vote.
    """

    draft: str = ""
    draft_layers: int = 0
    draft_tokens: int = 32


def makers(speaker: Speaker, parts: Parts) -> Makers:
    """For a model that answers. Raises UserError for settings that contradict each other."""
    settings = DraftSettings(
        path=parts.draft, layers=parts.draft_layers, lookahead=parts.draft_tokens
    )

    def spec_kv(budget: int) -> Method:
        draft = pipeline.opened(settings, speaker, speaker.model.dtype)
        return Methods(settings=settings, draft=draft).make("speckv", budget)

    named = bool(parts.draft or parts.draft_layers)
    return Makers(spec_kv=spec_kv if named else None, stop_ids=tuple(speaker.stop_ids))
