# SPDX-License-Identifier: Apache-2.0
"""The config of a CP run: what every run has, a head, and what it is trained for."""

import dataclasses

from lm.config import Config
from lm.cp_heads.head import HeadConfig
from lm.cp_heads.losses import LossConfig


@dataclasses.dataclass(frozen=True)
class CpConfig(Config):
    """Everything a run with a CP head needs."""

    head: HeadConfig = HeadConfig()
    loss: LossConfig = LossConfig()
