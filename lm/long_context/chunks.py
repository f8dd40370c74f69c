# SPDX-License-Identifier: Apache-2.0
"""Prompts in chunks: one loop on the device whose memory does not grow with chunk times prompt.

Rows are ragged: padding lies right of a prompt's tokens and nobody reads it. How many chunks run is
a run-time number, so that prompts of all lengths share the program of their buffers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from lm import contexts, generate, transformer
from lm.config import ModelConfig
from lm.errors import UserError
from lm.long_context import cache
from lm.long_context.cache import Buffers
from lm.sharding import Sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk(contexts.Sharded):
    """The tokens of one chunk, in the slots from `start` on, attending to all before them."""

    state: Buffers
    start: jax.Array  # [] int32
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    keys: str = dataclasses.field(default="write", metadata={"static": True})
    sharding: Sharding | None = dataclasses.field(default=None, metadata={"static": True})
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})

    def rope(self, config, positions):
        return None if self.keys == "read" else super().rope(config, positions)

    def with_state(self, state: Buffers) -> Self:
        return dataclasses.replace(self, state=state)

    def attend(self, state, layer, q, k, v):
        if self.sharding is None:
            return self._attend(state, layer, self.start, q, k, v)
        query = self.sharding.spec("batch", None, "heads", None)
        key = self.sharding.spec("batch", None, "kv_heads", None)
        scalar, buffers = self.sharding.spec(), cache.specs(state, self.sharding)
        inside = (buffers, scalar, scalar, query, key, key)
        attend = self.sharding.shard_map(self._attend, inside, (query, buffers))
        return attend(state, layer, self.start, q, k, v)

    def _attend(self, state, layer, start, q, k, v):
        state = cache.write(state, layer, k, v, start)
        # rows of padding see too much, and nobody reads them
        starts = jnp.broadcast_to(start, q.shape[:1])
        out = cache.dense_attention(
            state,
            layer,
            q,
            starts,
            config=self.config,
            rope=self.keys,
            implementation=self.implementation,
        )
        return out, state


def prefill(
    config: ModelConfig,
    params: transformer.Params,
    tokens: jax.Array,  # [B, P] int32, padded on the right; P a multiple of chunk
    lengths: jax.Array,  # [B] int32
    state: Any,
    context: Callable[[Any, jax.Array, jax.Array], contexts.Context],
    *,
    chunk: int,
) -> tuple[jax.Array, Any]:
    """Runs prompts through the model, `chunk` tokens at a time.

    Args:
      lengths: 0 is no sequence, only padding of the batch.
      state: what the contexts thread through layers and chunks, e.g. the buffers of a cache.
      context: from (state, start [], rows [B]) to the context of the chunk in the slots from
        `start` on, of which `rows[b]` are tokens of sequence b.

    Returns:
      Final-norm states [B, D] of the last token of every prompt (zeros where there is none), and
      the state.
    """
    B, P = tokens.shape
    if P % chunk:
        raise ValueError(f"{P} token slots are not a multiple of chunks of {chunk}")
    offsets = jnp.arange(chunk, dtype=jnp.int32)[None]

    def body(number, carry):
        last, state = carry
        start = number * chunk
        block = jax.lax.dynamic_slice(tokens, (0, start), (B, chunk))
        rows = jnp.clip(lengths - start, 0, chunk)
        positions = jnp.broadcast_to(start + offsets, (B, chunk))
        made = context(state, start, rows)
        states, made = transformer.hidden(config, params, block, positions, made)
        row = jnp.maximum(rows, 1) - 1
        own = jnp.take_along_axis(states, row[:, None, None], axis=1)[:, 0]
        ends = (rows > 0) & (lengths <= start + chunk)
        return jnp.where(ends[:, None], own, last), made.state

    nothing = jnp.zeros((B, config.embed_dim), config.dtype)
    count = (jnp.max(lengths) + chunk - 1) // chunk
    return jax.lax.fori_loop(0, count, body, (nothing, state))


def room(
    lengths: Sequence[int], new: int, chunk: int, capacity: int | None = None
) -> tuple[int, int]:
    """(token slots of the padded prompts, slots of the cache) for prompts of these lengths.

    Both depend on the longest prompt's bucket only, unless a capacity is asked for: then the cache
    has so many slots, and as many more as whole chunks take.

    Raises UserError when a prompt and its `new` tokens do not fit into the capacity.
    """
    longest = max(lengths)
    if capacity is not None and longest + new > capacity:
        raise UserError(
            f"prompt {list(lengths).index(longest)} has {longest} tokens and {new} new ones are "
            f"asked for: {longest + new} do not fit into a capacity of {capacity}"
        )
    size = generate.bucket(longest)
    if capacity is None:
        capacity = size + new
    size = min(size, capacity)
    slots = -(-size // chunk) * chunk
    return slots, -(-max(slots, capacity) // 64) * 64
