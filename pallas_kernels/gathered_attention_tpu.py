# SPDX-License-Identifier: Apache-2.0
"""Attention over listed slots on TPU: rows of the cache come by one copy each.

The grid is (sequences, blocks of queries). The cache stays in HBM, where the K heads of a listed
token lie side by side ([K, H], 2 KiB for 8 heads of 128 in bfloat16): one aligned copy. The copies
of a block of entries, its keys and its values, are all in flight at once while the block before is
computed; the slots to copy are in scalar memory. A block is turned once to [K, entries, H], and
rotated there if it has to be.

Queries, running maxima and sums, and the weighted values of all heads stay in VMEM: the listed rows
are read once per block of queries. Decode (G rows per KV head) is bound by the copies. A chunk of
512 queries of 32 heads over 2688 entries takes 4 * 512 * 32 * 2688 * 128 = 22 GFLOPs on 11 MiB:
compute decides.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.masked_attention_tpu import LANES, product

BLOCK = LANES  # entries: 256 copies in flight, 512 KiB of keys and values of 8 heads of 128


@dataclasses.dataclass(frozen=True)
class Settings:
    """What does not depend on arrays."""

    scale: float
    vmem_bytes: int
    interpret: pltpu.InterpretParams | None
    block: int = BLOCK


def _kernel(
    # prefetched
    layer,  # [1]
    num_blocks,  # [B]
    # inputs
    slots_ref,  # [1, M] in scalar memory: where entries lie
    q_ref,  # [K * chunks, rows, H]
    visible_ref,  # [1, M] int32: first row, as a slot, that sees the entry
    rows_ref,  # [chunks, rows, LANES] int32: slots of the rows
    k_hbm,  # [L, B, S, K, H]
    v_hbm,  # [L, B, S, K, H]
    *refs,  # cos, sin [M, H]; out [K * chunks, rows, H], lse [K * chunks, 1, lanes]; scratch
    has_rope: bool,
    settings: Settings,
):
    cos_ref, sin_ref = refs[:2] if has_rope else (None, None)
    out_ref, lse_ref, *scratch = refs[2:] if has_rope else refs
    k_rows, v_rows, keys_ref, values_ref, largest_ref, total_ref, weighted_ref, arrived = scratch
    b, block = pl.program_id(0), settings.block
    K, _, H = keys_ref.shape
    number, chunks = q_ref.shape[0], rows_ref.shape[0]

    def fetch(step):
        place = step % 2

        def copy(i, _):
            slot = slots_ref[0, step * block + i]
            for cache, rows in ((k_hbm, k_rows), (v_hbm, v_rows)):
                pltpu.make_async_copy(
                    cache.at[layer[0], b, pl.ds(slot, 1)],
                    rows.at[place, pl.ds(i, 1)],
                    arrived.at[place],
                ).start()

        jax.lax.fori_loop(0, block, copy, None)

    def wait(step):
        for rows in (
            k_rows,
            v_rows,
        ):  # semaphores count bytes: this waits for all copies of a block
            buffer = rows.at[step % 2]
            pltpu.make_async_copy(buffer, buffer, arrived.at[step % 2]).wait()

    def turn(step):
        keys_ref[...] = jnp.swapaxes(k_rows[step % 2].astype(keys_ref.dtype), 0, 1)
        values_ref[...] = jnp.swapaxes(v_rows[step % 2].astype(values_ref.dtype), 0, 1)
        if has_rope:
            entries = pl.ds(pl.multiple_of(step * block, block), block)

            def rotate(head, _):
                x = keys_ref[head].astype(jnp.float32)
                x = x * cos_ref[entries, :] + pltpu.roll(x, H // 2, 1) * sin_ref[entries, :]
                keys_ref[head] = x.astype(k_hbm.dtype).astype(keys_ref.dtype)

            jax.lax.fori_loop(0, K, rotate, None)

    def attend(step):
        visible_from = visible_ref[:, pl.ds(pl.multiple_of(step * block, block), block)]

        def add(at, _):
            head, chunk = at // chunks, at % chunks
            scores = settings.scale * product(q_ref[at], keys_ref[head], (1, 1))
            seen = visible_from <= rows_ref[chunk][:, :1]
            scores = jnp.where(seen, scores, -jnp.inf)  # [rows, entries]
            before = largest_ref[at]
            largest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            base = jnp.where(largest == -jnp.inf, 0.0, largest)
            weights = jnp.exp(scores - base[:, :1])
            rescale = jnp.exp(before - base)
            largest_ref[at] = largest
            total_ref[at] = total_ref[at] * rescale + jnp.sum(weights, axis=1, keepdims=True)
            weighted_ref[at] = weighted_ref[at] * rescale[:, :1] + product(
                weights.astype(values_ref.dtype), values_ref[head], (1, 0)
            )

        jax.lax.fori_loop(0, number, add, None)

    largest_ref[...] = jnp.full_like(largest_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)
    weighted_ref[...] = jnp.zeros_like(weighted_ref)
    steps = num_blocks[b]
    pl.when(steps > 0)(lambda: fetch(0))

    def visit(step, _):
        pl.when(step + 1 < steps)(lambda: fetch(step + 1))
        wait(step)
        turn(step)
        attend(step)

    jax.lax.fori_loop(0, steps, visit, None)

    def finish(at, _):
        total = total_ref[at]
        sees = total > 0
        total = jnp.where(sees, total, 1.0)
        out_ref[at] = (weighted_ref[at] / total[:, :1]).astype(out_ref.dtype)
        lse = jnp.where(sees, largest_ref[at] + jnp.log(total), -jnp.inf)
        lse_ref[at] = _across_lanes(lse, lse_ref.shape[2])

    jax.lax.fori_loop(0, number, finish, None)


def _across_lanes(columns: jax.Array, width: int) -> jax.Array:
    """[1, width]: rows of [rows, LANES], whose lanes are all equal, laid along the lanes; 0
    beyond."""
    parts = []
    for start in range(0, width, LANES):
        part = columns[start : start + LANES]
        row = jax.lax.broadcasted_iota(jnp.int32, part.shape, 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, part.shape, 1)
        parts.append(jnp.sum(jnp.where(row == lane, part, 0.0), axis=0, keepdims=True))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def vmem_needed(
    heads_and_chunks: int, rows: int, K: int, H: int, M: int, itemsize: int, has_rope: bool
) -> int:
    """Bytes of blocks (two of each) and scratch."""
    chunks = heads_and_chunks // K
    all_rows = heads_and_chunks * max(rows, 8)
    blocks = 2 * (2 * all_rows * H * itemsize + 4 * chunks * rows * LANES + 32 * M)
    blocks += 2 * 2 * 4 * M * H if has_rope else 0
    scratch = 4 * all_rows * (2 * LANES + H) + 6 * BLOCK * K * H * itemsize
    return blocks + scratch


def attend(
    q: jax.Array,  # [B, query blocks, K * chunks, rows, H]
    k: jax.Array,  # [L, B, S, K, H]
    v: jax.Array,  # [L, B, S, K, H]
    slots: jax.Array,  # [B, 1, M] int32 in 0 .. S - 1, M a multiple of the block
    visible_from: jax.Array,  # [B, 1, M] int32
    row_slots: jax.Array,  # [B, query blocks, chunks, rows, LANES] int32
    rope: tuple[jax.Array, jax.Array]
    | None,  # [B or 1, M, H]: cos, and sin with its first half negated
    layer: jax.Array,  # [1] int32
    num_blocks: jax.Array,  # [B] int32: blocks of entries that have valid ones
    dtype: jnp.dtype,  # of the output
    *,
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:
    """out like q in `dtype`, lse [B, query blocks, K * chunks, 1, rows or more] float32; rows that
    see nothing get 0 and -inf."""
    B, query_blocks, number, rows, H = q.shape
    K, M = k.shape[3], slots.shape[2]
    width = pl.cdiv(rows, LANES) * LANES
    entries = pl.BlockSpec((None, 1, M), lambda b, t, *_: (b, 0, 0))
    in_scalars = pl.BlockSpec((None, 1, M), lambda b, t, *_: (b, 0, 0), memory_space=pltpu.SMEM)
    of_queries = pl.BlockSpec((None, None, number, rows, H), lambda b, t, *_: (b, t, 0, 0, 0))
    of_rows = pl.BlockSpec((None, None, number // K, rows, LANES), lambda b, t, *_: (b, t, 0, 0, 0))
    of_lse = pl.BlockSpec((None, None, number, 1, width), lambda b, t, *_: (b, t, 0, 0, 0))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    inputs = [slots, q, visible_from, row_slots, k, v]
    specs = [in_scalars, of_queries, entries, of_rows, in_hbm, in_hbm]
    if rope is not None:
        shared = rope[0].shape[0] == 1
        table = pl.BlockSpec((None, M, H), lambda b, t, *_: (0 if shared else b, 0, 0))
        inputs, specs = [*inputs, *rope], [*specs, table, table]
    axes = jax.typeof(q).manual_axis_type
    rows_of_cache = [pltpu.VMEM((2, settings.block, K, H), x.dtype) for x in (k, v)]
    turned = [
        pltpu.VMEM((K, settings.block, H), jnp.promote_types(q.dtype, x.dtype)) for x in (k, v)
    ]
    pairs = B * query_blocks * number * rows * M
    return pl.pallas_call(
        partial(_kernel, has_rope=rope is not None, settings=settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, query_blocks),
            in_specs=specs,
            out_specs=[of_queries, of_lse],
            scratch_shapes=[
                *rows_of_cache,
                *turned,
                pltpu.VMEM((number, rows, LANES), jnp.float32),
                pltpu.VMEM((number, rows, LANES), jnp.float32),
                pltpu.VMEM((number, rows, H), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, dtype, manual_axis_type=axes),
            jax.ShapeDtypeStruct(
                (B, query_blocks, number, 1, width), jnp.float32, manual_axis_type=axes
            ),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=settings.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * H,
            transcendentals=pairs,
            bytes_accessed=2 * q.size * q.dtype.itemsize
            + B * query_blocks * M * K * H * (k.dtype.itemsize + v.dtype.itemsize),
        ),
        interpret=settings.interpret if settings.interpret is not None else False,
        name="gathered_attention",
    )(layer, num_blocks, *inputs)
