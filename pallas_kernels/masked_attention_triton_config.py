# SPDX-License-Identifier: Apache-2.0
"""Block sizes, warps and pipeline stages of the Triton attention kernels: one static table.

It imports without triton, so that a tuner can list candidates anywhere.
"""

import dataclasses
from typing import Any

import jax

PASSES = ("forward", "dq", "dkdv")
CAPABILITIES = (80, 90)
HEAD_DIMS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Config:
    """A program holds `block_q` queries (forward, dq) or `block_k` keys (dkdv) and walks the other
    side in blocks. Blocks are powers of two from 16 to 256."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for block in (self.block_q, self.block_k):
            if block not in (16, 32, 64, 128, 256):
                raise ValueError(f"blocks must be powers of two from 16 to 256: {self}")


# (pass, capability, head dim) -> config, for 2-byte types.
_HALF = {
    ("forward", 90, 64): Config(128, 128, 8, 3),
    ("forward", 90, 128): Config(128, 64, 8, 3),
    ("forward", 90, 256): Config(128, 32, 8, 3),
    ("dq", 90, 64): Config(128, 64, 8, 3),
    ("dq", 90, 128): Config(128, 64, 8, 3),
    ("dq", 90, 256): Config(128, 32, 8, 2),
    ("dkdv", 90, 64): Config(64, 128, 8, 3),
    ("dkdv", 90, 128): Config(64, 128, 8, 3),
    ("dkdv", 90, 256): Config(64, 32, 8, 2),
    ("forward", 80, 64): Config(128, 64, 4, 3),
    ("forward", 80, 128): Config(128, 64, 8, 3),
    ("forward", 80, 256): Config(64, 64, 8, 2),
    ("dq", 80, 64): Config(128, 64, 8, 3),
    ("dq", 80, 128): Config(128, 32, 8, 2),
    ("dq", 80, 256): Config(64, 32, 8, 2),
    ("dkdv", 80, 64): Config(64, 128, 8, 2),
    ("dkdv", 80, 128): Config(64, 64, 8, 3),
    ("dkdv", 80, 256): Config(64, 32, 8, 2),
}

# (pass, head dim) -> config for float32, whose products are plain multiplications and additions.
_SINGLE = {
    ("forward", 64): Config(32, 32, 4, 2),
    ("forward", 128): Config(16, 16, 4, 2),
    ("forward", 256): Config(16, 16, 4, 2),
    ("dq", 64): Config(32, 32, 4, 2),
    ("dq", 128): Config(32, 16, 8, 2),
    ("dq", 256): Config(16, 16, 4, 2),
    ("dkdv", 64): Config(16, 32, 4, 2),
    ("dkdv", 128): Config(16, 32, 8, 2),
    ("dkdv", 256): Config(16, 16, 8, 2),
}

# Part of jit's cache key, so that another config is another program.
_override = jax.make_user_context(())


def override(**configs: Config) -> Any:
    """Context manager: passes given by name ("forward", "dq", "dkdv") use these configs instead of
    the table's. Raises ValueError for another name."""
    if unknown := set(configs) - set(PASSES):
        raise ValueError(f"unknown passes {sorted(unknown)}; expected some of {PASSES}")
    return _override(tuple(sorted(configs.items())))


def config(pass_name: str, capability: int, head_dim: int, dtype: Any) -> Config:
    """The config of a pass; capabilities between those of the table use the next lower one.

    Raises KeyError for a head dim that is not in `HEAD_DIMS` or a capability below 80.
    """
    overridden = dict(_override.value)
    if pass_name in overridden:
        return overridden[pass_name]
    if jax.numpy.dtype(dtype).itemsize == 4:
        return _SINGLE[pass_name, head_dim]
    known = max((c for c in CAPABILITIES if c <= capability), default=capability)
    return _HALF[pass_name, known, head_dim]
