# SPDX-License-Identifier: Apache-2.0
"""The config of a CP run: what every run has, a head, what it is trained for, and what a study of
many heads compares."""

import dataclasses

from lm.config import Config, require_positive
from lm.cp_heads.head import HeadConfig
from lm.cp_heads.losses import LossConfig
from lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What `experiments.cp_heads.study` trains on one trunk and compares."""

    ranks: tuple[int, ...] = (1, 2, 4, 8)
    lengths: tuple[int, ...] = (4, 8)  # P, tokens that a head predicts
    temperatures: tuple[float, ...] = (0.0, 1.0)
    hmm: str = "linear"  # the transition beside the identity: "constant" or "linear"
    head_steps: int = 1200
    head_batch: int = 16  # rows of data.seq_len per step, of which loss.fraction is trained
    draft_layers: int = 2  # of the small model that drafts
    draft_dim: int = 256
    draft_steps: int = 1000
    prompt_tokens: int = 64
    new_tokens: int = 256  # per sequence, where speed is measured
    repeats: int = 5
    batches: tuple[int, ...] = (8, 32)  # also timed when there is time left
    check_tokens: int = 100_000  # greedy tokens compared with plain decoding

    def __post_init__(self):
        for name in ("ranks", "lengths", "batches"):
            for value in getattr(self, name):
                require_positive(f"study.{name}", value)
        for name in ("head_steps", "head_batch", "draft_layers", "draft_dim", "draft_steps"):
            require_positive(f"study.{name}", getattr(self, name))
        for name in ("prompt_tokens", "new_tokens", "repeats", "check_tokens"):
            require_positive(f"study.{name}", getattr(self, name))
        if self.hmm not in ("constant", "linear"):
            raise UserError(f"study.hmm={self.hmm!r} is not one of constant, linear")
        if not self.ranks or min(self.ranks) > 1 or max(self.ranks) == 1:
            raise UserError("study.ranks needs 1, which all are compared with, and another rank")
        if not self.temperatures or min(self.temperatures) < 0:
            raise UserError("study.temperatures: one at least, and none negative")
        if not self.lengths or min(self.lengths) < 2:
            raise UserError("study.lengths: a head that drafts predicts at least 2 tokens")


@dataclasses.dataclass(frozen=True)
class CpConfig(Config):
    """Everything a run with a CP head needs."""

    head: HeadConfig = HeadConfig()
    loss: LossConfig = LossConfig()
    study: StudyConfig = StudyConfig()
