# SPDX-License-Identifier: Apache-2.0
"""The config of draft inference: which model drafts, and what its drafts decide."""

import dataclasses

from lm.config import require_at_least_zero, require_choice, require_positive
from lm.errors import UserError
from lm.long_context.config import LongContextConfig


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """SpecPC: tokens that the draft's attention finds, with their neighbours, and the last ones.

    The paper's setting for its Llama pair is the default.
    """

    budget: int = 2048  # of the first stage of SpecKV-PC, in tokens
    window: int = 64  # last tokens whose queries vote, and which are kept
    kernel: int = 32  # votes are the maximum of so many neighbours
    neighbors: int = 32  # tokens kept around each that is found, itself included
    lookahead: int | None = 1  # tokens: all but the last vote, too; None: all that are drafted
    first_layer: int | None = None  # of the draft, that votes; None: min(8, half of them)
    weighted: bool = True  # queries count from 0, the oldest, to 1
    reduce: str = "max"  # over the window's queries: "max", or "mean" (then "max" over heads)
    positions: str = "packed"  # the target counts kept tokens, or keeps their "true" positions
    chunk: int = 32  # of SpecPrefill, in tokens, which keeps as many whole ones as a budget holds

    def __post_init__(self):
        for name in ("budget", "window", "kernel", "neighbors", "chunk"):
            require_positive(f"draft.prompt.{name}", getattr(self, name))
        if self.lookahead is not None:
            require_positive("draft.prompt.lookahead", self.lookahead)
        if self.first_layer is not None:
            require_at_least_zero("draft.prompt.first_layer", self.first_layer)
        if self.weighted and self.window < 2:
            raise UserError("draft.prompt.weighted needs draft.prompt.window of at least 2")
        require_choice("draft.prompt.reduce", self.reduce, ("max", "mean"))
        require_choice("draft.prompt.positions", self.positions, ("packed", "true"))


@dataclasses.dataclass(frozen=True)
class DraftSettings:
    """Who drafts, and SpecKV; the paper's setting is the default."""

    path: str = ""  # of the draft: a workdir or a Hugging Face directory; "": none
    layers: int = 0  # instead of a path: the target's own first layers draft
    budget: int = 256  # tokens kept of a prompt, the window inside
    lookahead: int | None = None  # tokens that are drafted at most; None: as many as are generated
    window: int = 32  # last tokens that are always kept
    kernel: int = 7  # odd: neighbours that share a score
    reduce: str = "max"  # over queries and the query heads of a KV head: "max" or "mean"
    pool: str = "max"  # over neighbours: "max" or "mean"
    band: int = 2048  # of the sparse prefill, in tokens; prompts up to band + columns are dense
    columns: int = 2048  # keys beside the band; 0: always dense
    floor: float = 0.2  # share of the budget that Ada-SpecKV leaves every KV head
    coverage: float = 0.0  # only as many as carry this share of the scores; 0: all of the budget
    least: int = 64  # tokens kept at least, with coverage
    seeds: tuple[int, ...] = (0,)  # of the samples that `evaluate` asks
    prompt: PromptSettings = PromptSettings()

    def __post_init__(self):
        for name in ("budget", "window", "kernel", "band", "least"):
            require_positive(f"draft.{name}", getattr(self, name))
        for name in ("layers", "columns"):
            require_at_least_zero(f"draft.{name}", getattr(self, name))
        if self.lookahead is not None:
            require_at_least_zero("draft.lookahead", self.lookahead)
        if self.path and self.layers:
            raise UserError("draft.path and draft.layers both name a draft: pass one of them")
        if self.kernel % 2 == 0:
            raise UserError(f"draft.kernel={self.kernel} must be odd: as many on either side")
        require_choice("draft.reduce", self.reduce, ("max", "mean"))
        require_choice("draft.pool", self.pool, ("max", "mean"))
        for name in ("floor", "coverage"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"draft.{name}={getattr(self, name)} must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class DraftConfig(LongContextConfig):
    """Everything a run of draft inference needs. Draft and target are runs of their own."""

    draft: DraftSettings = DraftSettings()
