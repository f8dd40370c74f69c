# SPDX-License-Identifier: Apache-2.0
"""The config of token selection: which cached tokens a step reads."""

import dataclasses

from lm.config import require_at_least_zero, require_choice, require_positive
from lm.errors import UserError
from lm.long_context.config import LongContextConfig


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """A step reads n_init first tokens, the k best in between and n_local last ones.

    The paper's own setting is the default; a field's comment says where the paper differs.
    """

    n_init: int = 128
    n_local: int = 512
    k: int = 2048
    chunk: int = 512  # prompt tokens that share a selection: at most n_local, unless none is made
    prefill: str = "select"  # "select", or "dense": chunks of the prompt see everything
    vote: str = "soft"  # sum over heads of "soft" attention, "raw" products, "hard" top-k votes
    head_weights: tuple[float, ...] = ()  # of the votes: N, or L * N layer by layer; (): 1 each
    scale_scores: bool = False  # products times head_dim ** -0.5, which the paper leaves out
    gqa: str = "grouped"  # "modulo": head h votes by KV head h % K, as the published code does
    pool: int = 0  # votes are the maximum of so many neighbours; 0: their own
    per_kv_head: bool = False  # every KV head picks for itself (the paper: one set for all)
    positions: str = "packed"  # positions in the list that is read, or "true" ones
    rope: str = "read"  # keys are rotated when they are read, or ("write") when they are written
    shadow: str = ""  # keys of 8 bits that are scored in place of the keys: "int8", "fp8"
    rescore: float = 1.25  # with a shadow: so many times k candidates are scored by true keys
    reuse: float = 0.0  # cosine of queries from which the last selection is kept; 0: never
    reuse_prefill: bool = False
    coverage: float = 0.0  # only as many of the k as carry this share of the votes; 0: all k
    # nothing is scored where all candidates are among the k: in chunks of a prompt, and with reuse
    shortcut: bool = True
    guard_every: int = 0  # every so many steps a dense one beside it; 0: never
    guard: str = "report"  # or "fallback": dense from a disagreement to the next agreement

    def __post_init__(self):
        for name in ("n_local", "k", "chunk"):
            require_positive(f"select.{name}", getattr(self, name))
        for name in ("n_init", "pool", "guard_every"):
            require_at_least_zero(f"select.{name}", getattr(self, name))
        if self.prefill == "select" and self.chunk > self.n_local:
            raise UserError(
                f"select.chunk={self.chunk} is larger than select.n_local={self.n_local}: a chunk "
                "that selects must lie within the window that it always reads"
            )
        require_choice("select.prefill", self.prefill, ("select", "dense"))
        require_choice("select.vote", self.vote, ("soft", "raw", "hard"))
        require_choice("select.gqa", self.gqa, ("grouped", "modulo"))
        require_choice("select.positions", self.positions, ("packed", "true"))
        require_choice("select.rope", self.rope, ("read", "write"))
        require_choice("select.shadow", self.shadow, ("", "int8", "fp8"))
        require_choice("select.guard", self.guard, ("report", "fallback"))
        self._check_shares()
        self._check_combinations()

    def _check_shares(self) -> None:
        for name in ("reuse", "coverage"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"select.{name}={getattr(self, name)} must be in [0, 1]")
        if self.rescore < 1:
            raise UserError(f"select.rescore={self.rescore} must be at least 1")
        for weight in self.head_weights:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
                raise UserError(f"select.head_weights: {weight!r} is not a number >= 0")

    def _check_combinations(self) -> None:
        if self.positions == "packed" and self.rope == "write":
            raise UserError(
                "select.positions='packed' needs select.rope='read': keys that are rotated when "
                "written keep their true positions"
            )
        if self.per_kv_head and self.gqa == "modulo":
            raise UserError(
                "select.per_kv_head needs select.gqa='grouped': under 'modulo' heads vote by keys "
                "that they do not read"
            )
        if self.coverage and self.vote != "soft":
            raise UserError(f"select.coverage needs select.vote='soft', not {self.vote!r}")
        if self.reuse_prefill and not self.reuse:
            raise UserError("select.reuse_prefill needs select.reuse above 0")
        if self.reuse_prefill and self.chunk > self.slack:
            raise UserError(
                f"select.reuse_prefill needs select.chunk={self.chunk} to be at most "
                f"select.n_local / 4 = {self.slack}: no more may leave the window before a "
                "selection is made again"
            )

    @property
    def budget(self) -> int:
        """Tokens that a step reads at most, those kept by `reuse` for a while not counted."""
        return self.n_init + self.k + self.n_local

    @property
    def slack(self) -> int:
        """Tokens that may leave the window while a selection is reused."""
        return self.n_local // 4 if self.reuse else 0


@dataclasses.dataclass(frozen=True)
class TokenSelectConfig(LongContextConfig):
    """Everything a run of token selection needs."""

    select: SelectConfig = SelectConfig()
