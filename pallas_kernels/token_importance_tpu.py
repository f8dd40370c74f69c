# SPDX-License-Identifier: Apache-2.0
"""Importance of cached tokens on TPU: the keys of one layer stream through VMEM, block by block.

The grid is (sequences, blocks of slots that the longest range needs). Prefetched scalars give the
layer and each sequence's first block and number of blocks, so only slots in some row's range are
fetched, straight out of the stack of layers; a sequence that is done names the block it has.

A block arrives token-major, [slots, K, H], and is turned once in VMEM (one bundle per slot of 8
heads of 128, by the compiler's schedule for v5e, where fetching the slot takes two), so that every
product is [rows of a KV head, slots]: slots along the lanes, for masks, exponentials and the scores
that are written.

`statistics` makes the log-sum-exp of every row, and with `keep` also writes the products (for one
row per head these are an eighth of the keys or less, and the rest is elementwise). `scores` takes
the products again and puts rows and heads together. Either pass reads 2 * K * H bytes per slot
(bfloat16) for 2 * rows * H FLOPs: up to 64 rows per KV head memory decides on every chip.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.masked_attention_tpu import LANES, product

_BLOCK_BYTES = 1 << 20


def block_size(num_slots: int, slot_bytes: int) -> int:
    """Slots of a block: 1 MiB of keys, which is long enough for the memory's full speed."""
    slots = max(_BLOCK_BYTES // slot_bytes // LANES, 1) * LANES
    return min(slots, -(-num_slots // LANES) * LANES)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What does not depend on arrays. `heads`: "all", "kv" or "query"; rows of a KV head are [query
    heads, window]."""

    scale: float
    block: int
    normalize: bool
    heads: str
    maximum: bool
    window: int  # rows of each query head, padding included
    vmem_bytes: int
    interpret: pltpu.InterpretParams | None


def _products(q_ref, k_ref, factors_ref, scale):
    """Yields scaled products [rows, slots] of each KV head."""
    keys = jnp.swapaxes(k_ref[...].astype(q_ref.dtype), 0, 1)
    for head in range(q_ref.shape[0]):
        out = scale * product(q_ref[head], keys[head], (1, 1))
        if factors_ref is not None:
            out = out * factors_ref[head : head + 1, :].astype(jnp.float32)
        yield head, out


def _seen(ends_ref, begin, first_slot, block):
    """[rows, slots] bool"""
    slots = first_slot + jax.lax.broadcasted_iota(jnp.int32, (ends_ref.shape[0], block), 1)
    return (slots >= begin) & (slots < ends_ref[:, :1])


def _statistics_kernel(
    # prefetched
    layer,  # [1]
    first,  # [B]
    counts,  # [B]
    begin,  # [B]
    # inputs
    q_ref,  # [K, rows, H]
    ends_ref,  # [rows, LANES]
    k_ref,  # [slots, K, H]
    *refs,  # factors [K, slots]; outputs lse [K, rows, LANES], products [N, slots]; scratch
    settings: Settings,
    has_factors: bool,
    keep: int,  # rows of a KV head whose products are kept
):
    del layer
    factors_ref, refs = (refs[0], refs[1:]) if has_factors else (None, refs)
    lse_ref, refs = refs[0], refs[1:]
    products_ref, refs = (refs[0], refs[1:]) if keep else (None, refs)
    largest_ref, total_ref = refs  # [K, rows, LANES]
    b, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def _():
        largest_ref[...] = jnp.full_like(largest_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(step < counts[b])
    def _():
        first_slot = (first[b] + step) * settings.block
        seen = _seen(ends_ref, begin[b], first_slot, settings.block)
        for head, values in _products(q_ref, k_ref, factors_ref, settings.scale):
            values = jnp.where(seen, values, -jnp.inf)
            if keep:
                products_ref[head * keep : (head + 1) * keep, :] = values[:keep]
            before = largest_ref[head]
            largest = jnp.maximum(before, jnp.max(values, axis=1, keepdims=True))
            base = jnp.where(largest == -jnp.inf, 0.0, largest)
            added = jnp.sum(jnp.exp(values - base[:, :1]), axis=1, keepdims=True)
            largest_ref[head] = largest
            total_ref[head] = total_ref[head] * jnp.exp(before - base) + added

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        total = total_ref[...]
        sees = total > 0
        lse = largest_ref[...] + jnp.log(jnp.where(sees, total, 1.0))
        lse_ref[...] = jnp.where(sees, lse, -jnp.inf)


def _scores_kernel(
    # prefetched
    layer,  # [1]
    first,  # [B]
    counts,  # [B]
    begin,  # [B]
    # inputs
    q_ref,  # [K, rows, H]
    ends_ref,  # [rows, LANES]
    k_ref,  # [slots, K, H]
    weights_ref,  # [K, rows, LANES]
    *refs,  # factors [K, slots]; lse [K, rows, LANES]; output scores [1, K or N, slots]
    settings: Settings,
    has_factors: bool,
):
    del layer
    factors_ref, refs = (refs[0], refs[1:]) if has_factors else (None, refs)
    lse_ref, out_ref = refs if settings.normalize else (None, *refs)
    b, step = pl.program_id(0), pl.program_id(1)
    nothing = -jnp.inf if settings.maximum else 0.0
    together = partial(jnp.max if settings.maximum else jnp.sum, axis=0, keepdims=True)

    @pl.when(step < counts[b])
    def _():
        first_slot = (first[b] + step) * settings.block
        seen = _seen(ends_ref, begin[b], first_slot, settings.block)
        of_heads = []
        for head, values in _products(q_ref, k_ref, factors_ref, settings.scale):
            if settings.normalize:
                lse = lse_ref[head][:, :1]
                base = jnp.where(lse == -jnp.inf, 0.0, lse)
                values = jnp.exp(jnp.where(seen, values - base, -jnp.inf))
            values = jnp.where(seen, values * weights_ref[head][:, :1], nothing)
            if settings.heads == "query":
                starts = range(0, values.shape[0], settings.window)
                of_heads += [together(values[at : at + settings.window]) for at in starts]
            else:
                of_heads.append(together(values))
        if settings.heads == "all":
            of_heads = [together(jnp.concatenate(of_heads, axis=0))]
        for number, values in enumerate(of_heads):
            out_ref[number : number + 1, :] = values


def _specs(q: jax.Array, k: jax.Array, settings: Settings, number_of_blocks: int):
    """Block specs of queries, row ends, keys, factors, and of arrays [B, rows, S]."""
    _, K, rows, H = q.shape

    def block(b, step, first, counts):
        place = first[b] + jnp.minimum(step, jnp.maximum(counts[b] - 1, 0))
        return jnp.minimum(place, number_of_blocks - 1)

    def of_slots(height):
        def index(b, step, layer, first, counts, begin):
            return b, 0, block(b, step, first, counts)

        return pl.BlockSpec((None, height, settings.block), index)

    def keys(b, step, layer, first, counts, begin):
        return layer[0], b, block(b, step, first, counts), 0, 0

    def of_rows(*shape):
        return pl.BlockSpec((None, *shape), lambda b, step, *_: (b,) + (0,) * len(shape))

    return (
        of_rows(K, rows, H),
        of_rows(rows, LANES),
        pl.BlockSpec((None, None, settings.block, K, H), keys),
        of_rows(K, rows, LANES),
        of_slots,
    )


def _call(kernel, inputs, specs, outputs, out_specs, scratch, scalars, steps, settings, passes):
    q, k = inputs[0], inputs[2]
    axes = jax.typeof(q).manual_axis_type
    B, K, rows, H = q.shape
    pairs = B * K * rows * k.shape[2]
    key_bytes = k.size // k.shape[0] * k.dtype.itemsize
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B, steps),
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=axes) for shape in outputs
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=settings.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * H,
            transcendentals=pairs,
            bytes_accessed=key_bytes + 4 * sum(B * s[1] * s[-1] for s in outputs),
        ),
        interpret=settings.interpret if settings.interpret is not None else False,
        name=f"token_importance_{passes}",
    )(*scalars, *inputs)


def statistics(
    q: jax.Array,  # [B, K, rows, H]
    ends: jax.Array,  # [B, rows, LANES] int32
    k: jax.Array,  # [L, B, S, K, H]
    factors: jax.Array | None,  # [B, K, S]
    scalars: tuple[jax.Array, ...],  # layer [1], first [B], counts [B], begin [B]: int32
    steps: jax.Array,  # int32, at least 1: blocks of the sequence that has most
    *,
    keep: int,
    settings: Settings,
) -> list[jax.Array]:
    """lse [B, K, rows, LANES], the same in every lane; with keep also the products [B, K * keep, S]
    of the first `keep` rows of each KV head: -inf or undefined where not seen."""
    B, K, rows, _ = q.shape
    S = k.shape[2]
    of_queries, of_ends, of_keys, of_stats, of_slots = _specs(
        q, k, settings, pl.cdiv(S, settings.block)
    )
    inputs, specs = [q, ends, k], [of_queries, of_ends, of_keys]
    if factors is not None:
        inputs, specs = [*inputs, factors], [*specs, of_slots(K)]
    outputs, out_specs = [(B, K, rows, LANES)], [of_stats]
    if keep:
        outputs, out_specs = [*outputs, (B, K * keep, S)], [*out_specs, of_slots(K * keep)]
    kernel = partial(
        _statistics_kernel, settings=settings, has_factors=factors is not None, keep=keep
    )
    scratch = [pltpu.VMEM((K, rows, LANES), jnp.float32)] * 2
    return _call(
        kernel, inputs, specs, outputs, out_specs, scratch, scalars, steps, settings, "statistics"
    )


def scores(
    q: jax.Array,  # [B, K, rows, H]
    ends: jax.Array,  # [B, rows, LANES] int32
    k: jax.Array,  # [L, B, S, K, H]
    weights: jax.Array,  # [B, K, rows, LANES] float32
    factors: jax.Array | None,  # [B, K, S]
    lse: jax.Array | None,  # [B, K, rows, LANES]
    scalars: tuple[jax.Array, ...],
    steps: jax.Array,
    *,
    settings: Settings,
) -> jax.Array:  # [B, 1, K or N, S]
    """Undefined in the blocks that no row of the sequence sees."""
    B, K, rows, _ = q.shape
    S = k.shape[2]
    of_queries, of_ends, of_keys, of_stats, of_slots = _specs(
        q, k, settings, pl.cdiv(S, settings.block)
    )
    inputs, specs = [q, ends, k, weights], [of_queries, of_ends, of_keys, of_stats]
    if factors is not None:
        inputs, specs = [*inputs, factors], [*specs, of_slots(K)]
    if settings.normalize:
        inputs, specs = [*inputs, lse], [*specs, of_stats]
    height = {"all": 1, "kv": K, "query": K * rows // settings.window}[settings.heads]
    kernel = partial(_scores_kernel, settings=settings, has_factors=factors is not None)
    return _call(
        kernel, inputs, specs, [(B, height, S)], [of_slots(height)], [], scalars, steps, settings,
        "scores",
    )[0]  # fmt: skip
