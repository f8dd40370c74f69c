# SPDX-License-Identifier: Apache-2.0
"""The seam between the layer-major loop and a method that evicts: what of a layer's prompt is kept?

An `Evictor` is static and compared by value, as a `Policy` is. Each layer shows it the whole of its
keys, values and queries once, as a `Prompt`, and it answers in three steps:

    score     how much a slot is worth, for every KV head or for all of them
    budgets   how many slots each KV head keeps, where that is not `budget`
    keep      the best slots of each list, the protected ends first: the same for all methods

A method is mostly a `score`:

    @dataclasses.dataclass(frozen=True)
    class Knorm(Evictor):  # arXiv 2406.11430
        def score(self, prompt):
            return -jnp.linalg.norm(prompt.k, axis=-1).swapaxes(1, 2)

`attention` is what the layer itself gives, from all of its keys; a method with a sparse prefill
says so there, and has the scores for it. A method with `extra` rows is given so many more tokens
after each prompt: their queries are part of `Prompt.window`, their keys and values are dropped.
With `refeed` the last token of the prompt is not kept either but fed again at its position, so that
the first token that is drawn already reads what was kept.

Rules: no choice may depend on another sequence of the batch, on padding, or on how long the
padding is. `score` and `budgets` run under `jax.shard_map`: what is summed over heads goes through
`prompt.heads.sum`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ModelConfig, require_positive
from lm.errors import UserError
from lm.long_context.heads import Heads
from lm.long_context.policy import Method
from lm.sharding import Sharding
from ops.masked_attention import masked_attention
from ops.top_tokens import top_tokens
from ops.visibility import Visibility

ALWAYS = float(np.finfo(np.float32).max)


class Choice(NamedTuple):
    """The slots that one layer keeps."""

    slots: jax.Array  # [B, K, M] int32, ascending, anything from counts on
    counts: jax.Array  # [B, K] int32


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One layer of whole prompts. Token i of sequence b lies in slot i; then come its extra rows,
    then padding."""

    config: ModelConfig
    layer: jax.Array  # [] int32
    q: jax.Array  # [B, T, N, H], rotated by the slots
    k: jax.Array  # [B, T, K, H], rotated
    v: jax.Array  # [B, T, K, H]
    lengths: jax.Array  # [B] int32: tokens of the prompt
    rows: jax.Array  # [B] int32: those and the extra ones after them
    end: jax.Array  # [B] int32: only slots before it may be kept
    extra: int  # extra rows of a sequence, at most
    heads: Heads
    implementation: str | None

    @property
    def slots(self) -> jax.Array:
        """[1, T] int32."""
        return jnp.arange(self.k.shape[1], dtype=jnp.int32)[None]

    @property
    def inside(self) -> jax.Array:
        """[B, T] bool: slots that may be kept."""
        return self.slots < self.end[:, None]

    def window(self, size: int) -> tuple[jax.Array, jax.Array]:
        """The last `size` queries of the prompt and the extra ones, [B, size + extra, N, H], and
        before which slot each stops seeing, [B, size + extra] int32: 0 for rows that are none."""
        first = self.lengths[:, None] - size
        row = first + jnp.arange(size + self.extra, dtype=jnp.int32)[None]
        real = (row >= 0) & (row < self.rows[:, None])
        inside = jnp.clip(row, 0, self.q.shape[1] - 1)
        q = jnp.take_along_axis(self.q, inside[:, :, None, None], axis=1)
        return q, jnp.where(real, row + 1, 0)


@dataclasses.dataclass(frozen=True)
class Evictor(Method):
    """Keeps `budget` tokens of a prompt, all where there are no more; a field of a subclass may
    take a property's place."""

    budget: int

    def __post_init__(self):
        require_positive(f"{type(self).__name__}: budget", self.budget)
        if self.sinks + self.window > self.budget:
            raise UserError(
                f"{type(self).__name__}: of a budget of {self.budget} tokens {self.sinks} first "
                f"and {self.window} last ones are always kept"
            )

    @property
    def sinks(self) -> int:
        """So many first tokens are always kept."""
        return 0

    @property
    def window(self) -> int:
        """So many last tokens, of those that may be kept, are always kept."""
        return 0

    @property
    def extra(self) -> int:
        """At most so many rows come after a prompt whose keys and values are dropped again."""
        return 0

    @property
    def refeed(self) -> bool:
        """Whether the last token of the prompt is fed again after the eviction."""
        return False

    @property
    def shared(self) -> bool:
        """Whether what a layer keeps is stored as one run of K times `budget` entries, which its
        heads share (`eviction.ragged`), in place of a list with room for `most` in every head."""
        return False

    @property
    def uniform(self) -> bool:
        """Whether every KV head of every layer keeps as many tokens of a prompt as the others."""
        return type(self).budgets is Evictor.budgets

    @property
    def record(self) -> bool:
        """Whether the state has the scores of all slots, as "seen"."""
        return False

    @property
    def limit(self) -> int:
        return self.budget

    @property
    def learns(self) -> bool:
        return True

    @property
    def steps(self) -> Method:
        return Evictor(1)  # they read whatever is there

    def check(self, config: ModelConfig, sharding: Sharding | None, capacity: int | None) -> None:
        if capacity is not None and self.budget > capacity:
            raise UserError(f"a budget of {self.budget} tokens is above the context of {capacity}")

    def most(self, config: ModelConfig) -> int:
        """Slots that a KV head of any layer keeps at most: room for as many is made for all."""
        return self.budget

    def score(self, prompt: Prompt) -> jax.Array:
        """[B, K, T], or [B, T] for all KV heads, float32; slots that may not be kept get
        anything but NaN."""
        raise NotImplementedError

    def budgets(self, prompt: Prompt, order: jax.Array) -> jax.Array | None:
        """[B, K] or [B, 1] int32: how many slots each KV head keeps, at most `most`; None: `budget`
        for all. More than there are is all there are.

        order: [B, K, T] what slots are picked by: the scores, with what is protected above all.
        """
        return None

    def attention(self, prompt: Prompt, scores: jax.Array) -> jax.Array:
        """[B, T, N, H]: what the layer itself gives, rows of padding aside.

        scores: [B, K, T] of `scored`.
        """
        B, T = prompt.q.shape[:2]
        visibility = Visibility(jnp.broadcast_to(prompt.rows[:, None], (B, T)))
        return masked_attention(
            prompt.q, prompt.k, prompt.v, visibility, implementation=prompt.implementation
        )

    def protected(self, prompt: Prompt) -> jax.Array:
        """[B, T] bool: slots that are kept whatever their scores."""
        return (prompt.slots < self.sinks) | (prompt.slots >= prompt.end[:, None] - self.window)

    def scored(self, prompt: Prompt) -> jax.Array:
        """[B, K, T] float32: `score`, for every KV head."""
        scores = self.score(prompt).astype(jnp.float32)
        B, T, K, _ = prompt.k.shape
        return jnp.broadcast_to(scores if scores.ndim == 3 else scores[:, None], (B, K, T))

    def keep(self, prompt: Prompt, scores: jax.Array) -> Choice:
        """The best slots of every KV head by scores [B, K, T]; of equal ones the lower slot
        wins."""
        B, T, K, _ = prompt.k.shape
        order = jnp.where(self.protected(prompt)[:, None], ALWAYS, scores)
        order = jnp.where(prompt.inside[:, None], order, -jnp.inf)
        budgets = self.budgets(prompt, order)
        size = min(self.most(prompt.config), T - prompt.extra)
        end = jnp.broadcast_to(prompt.end[:, None], (B, K))
        picked = top_tokens(
            order,
            size,
            begin=jnp.zeros_like(end),
            end=end,
            implementation=prompt.implementation,
        )
        choice = Choice(*picked)
        return choice if budgets is None else cut(choice, order, budgets)

    def dims(self) -> dict[str, tuple[str | None, ...]]:
        lists = ("batch", "kv_heads", None)
        return {"slots": lists, "scores": lists, "seen": lists, "kept": ("batch", "kv_heads")}

    def statistics(self, state: dict[str, Any]) -> dict[str, Any]:
        return {"kept": state["kept"]}

    def summarize(self, found: dict[str, np.ndarray]) -> dict[str, Any]:
        """`tokens_kept` of a prompt, mean over layers and KV heads, and `tokens_kept_most`."""
        kept = found["kept"]
        return {"tokens_kept": float(kept.mean()), "tokens_kept_most": int(kept.max())}


def cut(choice: Choice, order: jax.Array, budgets: jax.Array) -> Choice:
    """The best `budgets` of what was picked, still ascending."""
    M = choice.slots.shape[-1]
    entry = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32), choice.slots.shape)
    counts = jnp.minimum(choice.counts, budgets)
    inside = jnp.minimum(choice.slots, order.shape[-1] - 1)
    worth = jnp.take_along_axis(order, inside, axis=-1)
    # a stable sort: of equal scores the lower slot goes first
    best = jnp.argsort(jnp.where(entry < choice.counts[..., None], -worth, jnp.inf), axis=-1)
    places = jnp.sort(jnp.where(entry < counts[..., None], best, M), axis=-1)
    slots = jnp.take_along_axis(choice.slots, jnp.minimum(places, M - 1), axis=-1)
    return Choice(slots, counts)
