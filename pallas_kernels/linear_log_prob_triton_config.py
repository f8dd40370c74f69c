# SPDX-License-Identifier: Apache-2.0
"""Chunks of rows, and launches of the row kernels, of the Triton `linear_log_prob`: one entry.

It imports without triton, so that a tuner can list candidates anywhere.
"""

import dataclasses
from typing import Any

import jax

_FEWEST_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """Logits exist in float32 for `logit_mib` of rows at a time. Their gradients, in the type of
    the products, are collected for `gradient_mib` of rows, because each such chunk reads and writes
    the whole float32 gradient of w. A program of `num_warps` walks a row by `block` columns, of
    which `num_stages` blocks are on their way."""

    gradient_mib: int
    logit_mib: int
    block: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.block not in (1024, 2048, 4096, 8192) or min(self.gradient_mib, self.logit_mib) < 1:
            raise ValueError(f"blocks are powers of two from 1024 to 8192, sizes positive: {self}")

    def rows(self, num_rows: int, vocab: int, itemsize: int) -> tuple[int, int]:
        """Rows of a chunk and of one of its parts: nearly equal chunks of equal parts, multiples of
        8 rows when there is more than one."""
        most = max((self.gradient_mib << 20) // (itemsize * vocab), _FEWEST_ROWS)
        most_part = max((self.logit_mib << 20) // (4 * vocab), _FEWEST_ROWS)
        chunk = -(-num_rows // -(-num_rows // most))
        parts = -(-chunk // most_part)
        if parts == 1 and chunk == num_rows:
            return chunk, chunk
        part = -(-chunk // (8 * parts)) * 8
        return parts * part, part


# Chosen by calculation (`linear_log_prob_triton`), not measured. At a vocabulary of 128256 and
# D = 2048: 4096 rows of bfloat16 gradients, 1024 rows of logits, 0.98 GiB for the sum of dw.
_TABLE = Config(gradient_mib=1024, logit_mib=512, block=2048, num_warps=8, num_stages=3)

# Part of jit's cache key, so that another config is another program.
_override = jax.make_user_context(None)


def override(config: Config) -> Any:
    """Context manager: `config` instead of the table's."""
    return _override(config)


def config() -> Config:
    return _override.value or _TABLE
