# SPDX-License-Identifier: Apache-2.0
"""Importance of cached tokens by blocks of slots, from the first to the last that any row sees.

The first pass finds the log-sum-exp of every row, the second takes the products again and puts them
together. One row per sequence (decode) keeps its products instead: they are smaller than the keys
that would be read again.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops import _stacked, dispatch
from ops._varying import common_varying, varying_like

_PRODUCT_BYTES = 32 << 20
_SMALLEST_BLOCK = 128
# A block of keys is copied out of the cache. On a GPU a turn of the loop costs 30 us, the time
# to read 40 thousand slots of 8 heads of 128.
_LARGEST_BLOCK = {"cpu": 4096, "gpu": 65536, "tpu": 8192}


@dataclasses.dataclass(frozen=True)
class Combination:
    """How rows and heads are put together."""

    reduce: str
    heads: str
    gqa: str

    def split_heads(self, x: jax.Array, K: int) -> jax.Array:
        """[..., N] -> [..., K, G]: the query heads that read each KV head."""
        groups = x.shape[-1] // K
        if self.gqa == "grouped":
            return x.reshape(*x.shape[:-1], K, groups)
        return jnp.swapaxes(x.reshape(*x.shape[:-1], groups, K), -1, -2)

    def join_heads(self, x: jax.Array) -> jax.Array:
        """[..., K, G] -> [..., N]"""
        x = x if self.gqa == "grouped" else jnp.swapaxes(x, -1, -2)
        return x.reshape(*x.shape[:-2], -1)

    def put_together(self, values: jax.Array, seen: jax.Array) -> jax.Array:
        """[B, K, G, W, S] of the rows that see the slots ([B, W, S]) -> [B, 1 or K, 1 or G, S]"""
        axes = {"all": (1, 2, 3), "kv": (2, 3), "query": (3,)}[self.heads]
        seen = seen[:, None, None]
        if self.reduce == "max":
            return jnp.max(jnp.where(seen, values, -jnp.inf), axes, keepdims=True)[:, :, :, 0]
        return jnp.sum(jnp.where(seen, values, 0.0), axes, keepdims=True)[:, :, :, 0]

    def finish(
        self, scores: jax.Array, begin: jax.Array, end: jax.Array, num_heads: int, nothing: float
    ) -> jax.Array:
        """[B, 1 or K, 1 or G, S] -> what the op returns; `nothing` where no row sees the slot."""
        _, K, G, S = scores.shape
        if self.reduce == "mean":
            rows = jnp.sum(end > begin[:, None], axis=1, dtype=jnp.int32)
            together = jnp.maximum(rows, 1) * (num_heads // (K * G))
            scores = scores / together.astype(jnp.float32)[:, None, None, None]
        slots = jnp.arange(S, dtype=jnp.int32)[None]
        seen = (slots >= begin[:, None]) & (slots < jnp.max(end, axis=1)[:, None])
        scores = jnp.where(seen[:, None, None], scores, nothing)
        if self.heads == "all":
            return scores[:, 0, 0]
        if self.heads == "kv":
            return scores[:, :, 0]
        return self.join_heads(scores.transpose(0, 3, 1, 2)).transpose(0, 2, 1)


def token_importance(
    q: jax.Array,  # [B, W, N, H]
    k: jax.Array,  # [L, B, S, K, H]
    begin: jax.Array,  # [B] int32 in 0 .. S
    end: jax.Array,  # [B, W] int32 in 0 .. S
    layer: jax.Array,  # [] int32
    k_scale: jax.Array | None,  # [L, B, S, K]
    row_weights: jax.Array | None,  # [B, W] float32
    head_weights: jax.Array | None,  # [N] float32
    *,
    scale: float,
    normalize: bool,
    reduce: str,
    heads: str,
    gqa: str,
    return_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
    B, W, N, H = q.shape
    S, K = k.shape[2:4]
    q, k, begin, end, layer, k_scale, row_weights, head_weights = common_varying(
        (q, k, begin, end, layer, k_scale, row_weights, head_weights)
    )
    combination = Combination(reduce, heads, gqa)
    block = block_size(B * W * N, S)
    dtype = _stacked.compute_dtype(q, k)
    # [B, K, G * W, H]
    rows = combination.split_heads(q.transpose(0, 1, 3, 2), K).transpose(0, 3, 4, 1, 2)
    rows = rows.reshape(B, K, N // K * W, H).astype(dtype)

    def products(first):  # [B, K, G, W, block] float32
        keys = _slots(k, layer, first, block).astype(dtype)
        out = jnp.einsum("BKRH,BSKH->BKRS", rows, keys, preferred_element_type=jnp.float32)
        if k_scale is not None:
            factors = _slots(k_scale, layer, first, block).astype(jnp.float32)
            out = out * jnp.swapaxes(factors, 1, 2)[:, :, None]
        return (scale * out).reshape(B, K, N // K, W, block)

    rules = begin, end, row_weights, head_weights
    loop = _Loop(block, S, begin, end)
    lse = None
    if block == S or W == 1:
        kept = products(0) if block == S else loop.kept(products, (B, K, N // K, W))
        if normalize or return_lse:
            seen = _seen(begin, end, 0, S)[:, None, None]
            lse = jax.nn.logsumexp(jnp.where(seen, kept, -jnp.inf), axis=-1)
        scores = combined(kept, rules, lse if normalize else None, combination)
    else:
        if normalize or return_lse:
            lse = loop.log_sum_exp(products, (B, K, N // K, W))
        subtracted = lse if normalize else None
        sizes = {"all": (1, 1), "kv": (K, 1), "query": (K, N // K)}[heads]
        scores = loop.kept(
            lambda first: combined(products(first), rules, subtracted, combination, first),
            (B, *sizes),
        )
    scores = combination.finish(scores, begin, end, N, 0.0 if normalize else -jnp.inf)
    if not return_lse:
        return scores, None
    return scores, combination.join_heads(lse.transpose(0, 3, 1, 2))


def combined(
    values: jax.Array,  # [B, K, G, W, slots] scaled products
    rules: tuple[jax.Array | None, ...],  # begin [B], end [B, W], row_weights, head_weights
    lse: jax.Array | None,  # [B, K, G, W]: normalizes
    combination: Combination,
    first: jax.Array | int = 0,
) -> jax.Array:  # [B, 1 or K, 1 or G, slots]
    """What rows and heads give together to the slots from `first` on; values of slots that a row
    does not see may be anything."""
    begin, end, row_weights, head_weights = rules
    _, K, _, _, slots = values.shape
    seen = _seen(begin, end, first, slots)
    if lse is not None:
        base = jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]
        values = jnp.exp(jnp.where(seen[:, None, None], values - base, -jnp.inf))
    if row_weights is not None:
        values = values * row_weights[:, None, None, :, None]
    if head_weights is not None:
        values = values * combination.split_heads(head_weights, K)[None, :, :, None, None]
    return combination.put_together(values, seen)


def _seen(begin: jax.Array, end: jax.Array, first: jax.Array | int, number: int) -> jax.Array:
    """[B, W, number]: which slots from `first` on a row sees."""
    slots = first + jnp.arange(number, dtype=jnp.int32)[None, None]
    return (slots >= begin[:, None, None]) & (slots < end[:, :, None])


@dataclasses.dataclass(frozen=True)
class _Loop:
    """Over the blocks of slots that any row of the batch sees.

    The last block overlaps the one before instead of reaching beyond the cache.
    """

    block: int
    num_slots: int
    begin: jax.Array
    end: jax.Array

    def run(self, body, state):
        first = jnp.min(self.begin) // self.block
        last = (jnp.max(self.end) + self.block - 1) // self.block
        state = varying_like(state, self.begin)
        return jax.lax.fori_loop(first, last, body, state)

    def start(self, step):
        return jnp.minimum(step * self.block, self.num_slots - self.block)

    def kept(self, compute, shape):
        """[*shape, S] of what `compute` gives for the blocks; zeros elsewhere."""

        def body(step, kept):
            first = self.start(step)
            return jax.lax.dynamic_update_slice_in_dim(kept, compute(first), first, axis=-1)

        return self.run(body, jnp.zeros((*shape, self.num_slots), jnp.float32))

    def log_sum_exp(self, compute, shape):
        def body(step, state):
            largest, total = state
            first = self.start(step)
            fresh = first + jnp.arange(self.block, dtype=jnp.int32) >= step * self.block
            seen = _seen(self.begin, self.end, first, self.block) & fresh[None, None]
            values = jnp.where(seen[:, None, None], compute(first), -jnp.inf)
            before, largest = largest, jnp.maximum(largest, jnp.max(values, axis=-1))
            base = jnp.where(largest == -jnp.inf, 0.0, largest)
            added = jnp.sum(jnp.exp(values - base[..., None]), axis=-1)
            return largest, total * jnp.exp(before - base) + added

        state = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32)
        largest, total = self.run(body, state)
        sees = total > 0
        return jnp.where(sees, largest + jnp.log(jnp.where(sees, total, 1.0)), -jnp.inf)


def _slots(cache: jax.Array, layer: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """[B, count, ...] of [L, B, S, ...]; no index counts elements, whose number may pass 2^31."""
    zero = jnp.int32(0)
    start = (layer, zero, jnp.int32(first)) + (zero,) * (cache.ndim - 3)
    size = (1, cache.shape[1], count, *cache.shape[3:])
    if dispatch.current_platform() == "cpu":
        # XLA slices in float32 there. The barrier ties the cache to this block, or else its
        # conversion would move out of the loop, over the whole stack.
        cache, start = jax.lax.optimization_barrier((cache, start))
    return jax.lax.dynamic_slice(cache, start, size)[0]


def block_size(rows: int, num_slots: int) -> int:
    """Slots per block: about 32 MiB of float32 products for `rows` (B * W * N) rows."""
    block = _PRODUCT_BYTES // (4 * rows)
    largest = _LARGEST_BLOCK.get(dispatch.current_platform(), _LARGEST_BLOCK["cpu"])
    return min(max(block, _SMALLEST_BLOCK), largest, num_slots)
