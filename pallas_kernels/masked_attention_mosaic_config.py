# SPDX-License-Identifier: Apache-2.0
"""Blocks and stages of the Mosaic GPU attention kernels for each head dim."""

import contextlib
import dataclasses
from collections.abc import Iterator

HEAD_DIMS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Config:
    """Blocks of 64 keys (forward, dq) or rows (dk, dv) in a step, and steps in flight."""

    units: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One head dim's configurations, and which gradients a call of the dk/dv kernel computes: at
    head dim 256 the sums of both do not fit the registers."""

    forward: Config
    dq: Config
    dk_dv: Config
    dk_dv_calls: tuple[tuple[str, ...], ...] = (("dk", "dv"),)


PLANS = {
    64: Plan(Config(2, 3), Config(2, 2), Config(1, 6)),
    128: Plan(Config(2, 2), Config(1, 2), Config(1, 4)),
    256: Plan(Config(1, 2), Config(1, 1), Config(1, 1), (("dk",), ("dv",))),
}
# The dk/dv kernel splits query heads among programs up to about this many.
PROGRAMS = 1024
_override: list[Plan] = []


def plan(head_dim: int) -> Plan:
    return _override[-1] if _override else PLANS[head_dim]


@contextlib.contextmanager
def override(candidate: Plan) -> Iterator[None]:
    """Uses `candidate` for what is traced inside: for tuning."""
    _override.append(candidate)
    try:
        yield
    finally:
        _override.pop()
