# SPDX-License-Identifier: Apache-2.0
"""The methods of draft inference beside those that it is compared with, at one budget: tokens kept
of a prompt.

| name | keeps | says so |
|---|---|---|
| dense | everything | |
| speckv | KV, for each KV head | the target's own attention, a draft's tokens looking on |
| ada_speckv | the same, a layer's budget shared by its heads, stored as unevenly | the same |
| specpc | tokens of the prompt | the draft's attention |
| speckv_pc | KV of those tokens | first the one, then the other |
| laq | KV, for each KV head | tokens that the target drafts with what SnapKV keeps (LAQ++) |
| spec_prefill | chunks of the prompt | the draft's attention (SpecPrefill) |
| others | see `lm.long_context.eviction` | |
"""

import dataclasses
from typing import Any

from lm.draft_inference.compression import Everything
from lm.draft_inference.config import DraftSettings
from lm.draft_inference.draft import Drafter, FirstLayers
from lm.draft_inference.laq import OwnDraft
from lm.draft_inference.method import Drafted
from lm.draft_inference.proposals import InBlocks, Proposals
from lm.draft_inference.spec_prefill import SpecPrefill
from lm.draft_inference.speckv import SpecKV
from lm.draft_inference.specpc import SpecPC
from lm.errors import UserError
from lm.long_context import methods
from lm.long_context.eviction import EVICTORS
from lm.long_context.eviction.adakv import AdaKV
from lm.long_context.methods import DENSE
from lm.long_context.policy import Method

PAPER = ("speckv", "specpc", "speckv_pc", "ada_speckv")
WATCHING = ("specpc", "speckv_pc", "spec_prefill")  # a draft's attention
VOTED = ("speckv", "ada_speckv")  # by a draft's tokens alone
OWN = (*PAPER, "laq", "spec_prefill")
LAQ_TOKENS = 8  # a few, as its name says
USUAL = (DENSE, "speckv", "specpc", "speckv_pc", "ada_speckv", "snapkv", "laq", "spec_prefill")


@dataclasses.dataclass(frozen=True)
class Methods(methods.Methods):
    """The table at `DraftSettings`, with the draft that its methods share (None: only those that
    need none can be made, unless `settings.layers` says that the target drafts, or `proposals` are
    what its own heads say: then what only takes a draft's tokens can be, too)."""

    settings: DraftSettings = DraftSettings()
    draft: Drafter | None = None
    proposals: Proposals | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (DENSE, *OWN, *EVICTORS)

    @property
    def usual(self) -> tuple[str, ...]:
        return USUAL

    @property
    def budget(self) -> int:
        return self.settings.budget

    @property
    def ends(self) -> int:
        return self.settings.window

    def make(self, name: str, budget: int) -> Method:
        self.check(name)
        if name in EVICTORS:
            return EVICTORS[name](budget)
        settings = self.settings
        if name == "laq":
            snapkv = EVICTORS["snapkv"](budget)
            keeps = self._speckv(budget, window=snapkv.window, reduce="mean", pool="mean")
            return Drafted(OwnDraft(snapkv), keeps, lookahead=LAQ_TOKENS)
        drafter = self._drafter(name, budget)
        if name == "specpc":
            return Drafted(drafter, Everything(budget), self._specpc(budget))
        if name == "spec_prefill":
            compressor = SpecPrefill(budget, chunk=settings.prompt.chunk)
            return Drafted(drafter, Everything(budget), compressor)
        keeps, compressor = self._speckv(budget), None
        if name == "ada_speckv":
            if settings.coverage:
                raise UserError("ada_speckv shares all of a budget: draft.coverage must be 0")
            keeps = AdaKV(budget, keeps, settings.floor, shared=True)
        if name == "speckv_pc":
            compressor = self._specpc(max(settings.prompt.budget, budget))
        return Drafted(drafter, keeps, compressor, settings.lookahead)

    def drafter(self, budget: int) -> Drafter | None:
        """Who drafts where so many tokens are kept; None: nobody."""
        if self.proposals is not None:
            return InBlocks(EVICTORS["snapkv"](budget), self.proposals)
        if self.draft is None and self.settings.layers:
            return FirstLayers(self.settings.layers)
        return self.draft

    def _drafter(self, name: str, budget: int) -> Drafter:
        found = self.drafter(budget)
        if found is None:
            raise UserError(
                f"{name} needs a draft: draft.path names one, or draft.layers of the target"
            )
        if name in WATCHING and isinstance(found, InBlocks):
            raise UserError(
                f"{name} chooses by a draft's attention, and heads only propose tokens: it takes a "
                "draft model, or draft.layers of the target"
            )
        return found

    def _speckv(self, budget: int, **others: Any) -> SpecKV:
        names = ("window", "kernel", "reduce", "pool", "band", "columns", "coverage")
        fields = {name: getattr(self.settings, name) for name in names}
        least = self.settings.least if self.settings.coverage else 1
        return SpecKV(budget, **fields | {"least": least} | others)

    def _specpc(self, budget: int) -> SpecPC:
        fields = dataclasses.asdict(self.settings.prompt)
        del fields["chunk"]
        return SpecPC(**fields | {"budget": budget})
