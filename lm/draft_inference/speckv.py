# SPDX-License-Identifier: Apache-2.0
"""SpecKV (arXiv 2506.08373, section on KV dropping): a draft's tokens vote on what the target keeps
of a prompt.

Rows of the draft's tokens follow the prompt. In each layer the last `window` + 1 queries of the
prompt and those of the draft attend to every key; the largest that a slot gets from any of them and
from any query head of a KV head, and the largest of `kernel` neighbours, is its score. The best of
every KV head are kept beside the window; the last token is fed again, at its position, when the
rest has gone. Long prompts take a sparse prefill by the same scores: a band of recent keys, and the
best `columns` left of it.

Deviates: a prompt within the budget runs the same code instead of a shortcut, with dense attention;
lists are ascending, which attention does not see.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.errors import UserError
from lm.long_context.eviction import evictor
from lm.long_context.eviction.evictor import ALWAYS, Choice, Prompt
from lm.long_context.eviction.snapkv import SnapKV
from lm.sharding import Sharding
from ops.sparse_attention import BLOCK, sparse_attention
from ops.top_tokens import top_tokens


@dataclasses.dataclass(frozen=True)
class SpecKV(SnapKV):
    """The last `window` tokens and what the window and `extra` drafted tokens look at."""

    refeed: ClassVar[bool] = True

    window: int = 32
    kernel: int = 7
    reduce: str = "max"
    pool: str = "max"
    extra: int = 0  # drafted tokens of a prompt, at most
    band: int = 2048
    columns: int = 2048  # 0: prefill is dense
    coverage: float = 0.0  # above 0: only as many slots as carry this share of a list's scores
    least: int = 1  # of a list, with coverage
    record: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.columns and self.budget > self.dense:
            raise UserError(
                f"a budget of {self.budget} tokens is above the {self.dense} up to which prompts "
                "are attended to densely (band + columns)"
            )
        if self.coverage and self.least > self.budget:
            raise UserError(f"at least {self.least} tokens are above a budget of {self.budget}")

    @property
    def dense(self) -> int:
        """Longer prompts, with their drafted tokens, are attended to sparsely."""
        return self.band + self.columns

    @property
    def uniform(self) -> bool:
        return not self.coverage

    def check(self, config: ModelConfig, sharding: Sharding | None, capacity: int | None) -> None:
        super().check(config, sharding, capacity)
        if self.band % BLOCK and self.columns:
            raise UserError(f"band={self.band} must be a multiple of {BLOCK}")

    def attention(self, prompt: Prompt, scores: jax.Array) -> jax.Array:
        last = prompt.lengths - self.window - 1
        if not self.columns or prompt.k.shape[1] <= self.dense:
            return super().attention(prompt, scores)
        # of these every key left of the band is a column: they see everything
        whole = (prompt.rows <= self.dense) | (prompt.lengths <= self.budget)
        first = jnp.broadcast_to(-prompt.slots[:, None].astype(jnp.float32), scores.shape)
        order = jnp.where(whole[:, None, None], first, scores)
        end = jnp.maximum(jnp.where(whole, prompt.rows, last), 0)
        end = jnp.broadcast_to(end[:, None], scores.shape[:2])
        size = max(self.columns, self.budget + self.extra - self.band)
        choice = Choice(
            *top_tokens(
                order,
                size,
                begin=jnp.zeros_like(end),
                end=end,
                implementation=prompt.implementation,
            )
        )
        if size > self.columns:
            most = jnp.where(whole, size, self.columns)[:, None]
            choice = evictor.cut(choice, order, most)
        return sparse_attention(
            prompt.q,
            prompt.k,
            prompt.v,
            choice.slots,
            counts=choice.counts,
            lengths=prompt.rows,
            band=self.band,
            implementation=prompt.implementation,
        )

    def budgets(self, prompt: Prompt, order: jax.Array) -> jax.Array | None:
        if not self.coverage:
            return None
        worth = jnp.where((order == ALWAYS) | (order == -jnp.inf), 0.0, order)
        size = min(self.budget - self.window, order.shape[-1])
        best = jax.lax.top_k(worth, max(size, 1))[0]
        wanted = self.coverage * jnp.sum(worth, axis=-1, keepdims=True)
        before = jnp.cumsum(best, axis=-1) - best
        taken = self.window + jnp.sum((before < wanted) & (best > 0), axis=-1, dtype=jnp.int32)
        return jnp.clip(taken, self.least, self.budget)
