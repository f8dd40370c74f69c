# SPDX-License-Identifier: Apache-2.0
"""Masked attention on Hopper, backward: two Pallas Mosaic GPU kernels.

One walks the keys of each tile of queries for dq, the other the queries of each tile of keys for dk
and dv, so that every sum has one owner and a fixed order: seven products instead of five, but the
same bits in every run and no atomics. The second works on transposed scores [keys, rows], which
makes the weights the left operand of its products straight from registers.

With c = scale * log2(e), L = lse * log2(e) and D = dlse - sum(out * dout):
p = exp2(c q k - L), ds = p (dout v + D), dq = scale ds k, dk = scale ds^T q, dv = p^T dout.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.masked_attention_mosaic import (
    LOG2E,
    fetch_blocks,
    fetch_vectors,
    place,
    rows_of,
    steps_of,
    visible_keys,
)
from pallas_kernels.masked_attention_mosaic_config import Config
from pallas_kernels.mosaic import COMPUTE, UNIT

KIND_BITS = 2  # of an entry of the lists of rows, for each compute warpgroup
KEYS = COMPUTE * UNIT  # of a tile of keys


def dq(
    q: jax.Array,  # [B, T, N, H] bfloat16 or float16
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    d_out: jax.Array,  # [B, T, N, H]
    lse: jax.Array,  # [B, N, T'] float32: L, +inf for rows that see nothing
    shift: jax.Array,  # [B, N, T'] float32: D, finite
    vectors: jax.Array,  # as for the forward pass, like all that follows
    row_offset: jax.Array,
    counts: jax.Array,
    indices: jax.Array,
    *,
    scale: float,
    config: Config,
) -> jax.Array:
    """[B, T, N, H]; T' is at least tiles * tile_rows."""
    B, _, N, H = q.shape
    K, tiles = k.shape[2], counts.shape[1]
    G = N // K
    grid = (B, K, tiles, G // mosaic.heads_per_tile(G))
    keys, stages, dtype = config.units * UNIT, config.stages, q.dtype
    shape = (UNIT, keys)

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, shift_ref, vector_ref, offset_ref,
               count_ref, index_ref, dq_ref, q_smem, do_smem, k_smem, v_smem, vector_smem,
               q_ready, k_ready, v_ready, vector_ready, k_free, v_free):  # fmt: skip
        wg = lax.axis_index("wg")
        b, kv_head, tile, group = place(lax.axis_index("program"), grid)
        unmasked, steps = steps_of(count_ref, b, tile, config.units)

        def blocks_of(step):
            return [index_ref[b, tile, step * config.units + unit] for unit in range(config.units)]

        @pl.when(wg == COMPUTE)
        def _fetch():
            plgpu.set_max_registers(24, action="decrease")

            @pl.loop(0, steps)
            def _(step):
                slot, blocks = lax.rem(step, stages), blocks_of(step)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                fetch_blocks(v_ref, b, kv_head, blocks, v_smem.at[slot], v_ready.at[slot])
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                fetch_blocks(k_ref, b, kv_head, blocks, k_smem.at[slot], k_ready.at[slot])

                @pl.when(step >= unmasked)
                def _():
                    fetch_vectors(
                        vector_ref, b, blocks, vector_smem.at[slot], vector_ready.at[slot]
                    )

        @pl.when(wg < COMPUTE)
        def _accumulate():
            plgpu.set_max_registers(240, action="increase")
            row, head = rows_of(wg, tile, group, kv_head, G)
            rows = (b, pl.ds(row, UNIT), head)
            my_q, my_do = q_smem.at[wg], do_smem.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[rows], my_q, q_ready.at[wg])
            plgpu.copy_gmem_to_smem(do_ref.at[rows], my_do, q_ready.at[wg])
            of_rows = (b, head, pl.ds(row, UNIT))
            lse_rows = mosaic.load(lse_ref.at[of_rows], mosaic.ACROSS)
            shift_rows = mosaic.load(shift_ref.at[of_rows], mosaic.ACROSS)
            plgpu.barrier_wait(q_ready.at[wg])

            def accumulate(step, acc, masked):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.barrier_wait(k_ready.at[slot])

                def products(s_ref, dp_ref):
                    plgpu.wgmma(s_ref, my_q, mosaic.transposed(k_smem.at[slot]))
                    plgpu.wgmma(dp_ref, my_do, mosaic.transposed(v_smem.at[slot]))
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                    p = jnp.exp2(s * (scale * LOG2E) - mosaic.across(lse_rows, shape))
                    if masked:
                        plgpu.barrier_wait(vector_ready.at[slot])
                        sees = visible_keys(
                            blocks_of(step), row + offset_ref[b], vector_smem.at[slot]
                        )
                        p = jnp.where(sees, p, 0.0)
                    return p, plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)

                wide = plgpu.ACC(shape, jnp.float32)
                p, dp = pl.run_scoped(products, wide, wide)
                plgpu.barrier_arrive(v_free.at[slot])
                ds = p * (dp + mosaic.across(shift_rows, shape))
                acc = mosaic.multiply_add(acc, ds.astype(dtype), k_smem.at[slot])
                plgpu.barrier_arrive(k_free.at[slot])
                return acc

            acc = mosaic.accumulator((UNIT, H))
            acc = lax.fori_loop(0, unmasked, partial(accumulate, masked=False), acc)
            acc = lax.fori_loop(unmasked, steps, partial(accumulate, masked=True), acc)
            my_q[...] = (acc * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(my_q, dq_ref.at[rows])
            plgpu.wait_smem_to_gmem(0)

    copies = plgpu.Barrier(num_arrivals=config.units, num_barriers=stages)
    vector_copies = plgpu.Barrier(num_arrivals=config.units * vectors.shape[1], num_barriers=stages)
    freed = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        scratch_types=[
            mosaic.shared((COMPUTE, UNIT, H), dtype),
            mosaic.shared((COMPUTE, UNIT, H), dtype),
            mosaic.shared((stages, keys, H), dtype),
            mosaic.shared((stages, keys, H), dtype),
            plgpu.SMEM((stages, vectors.shape[1], keys), jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
            copies,
            copies,
            vector_copies,
            freed,
            freed,
        ],
        grid=(math.prod(grid),),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, d_out, lse, shift, vectors, row_offset, counts, indices)


def visible_rows(row, key, vectors) -> jax.Array:
    """[keys, rows] bool: which of the UNIT rows from index `row` on see each of the UNIT keys from
    `key` on, whose entries of the mask's vectors are given."""
    shape = (UNIT, UNIT)
    j, i = mosaic.positions(shape, 0), mosaic.positions(shape, 1)
    span, *hidden = (mosaic.across(vector, shape) for vector in vectors)
    sees = mosaic.unsigned(i - j + (row - key)) < mosaic.unsigned(span)
    if hidden:
        start, length = hidden
        sees &= mosaic.unsigned(i - start + row) >= mosaic.unsigned(length)
    return sees


def dk_dv(
    q: jax.Array,  # [B, T, N, H] bfloat16 or float16
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    d_out: jax.Array,  # [B, T, N, H]
    lse: jax.Array,  # [B, N, T'] float32: L, +inf for rows that see nothing
    shift: jax.Array,  # [B, N, T'] float32: D, finite
    vectors: jax.Array,  # [B, 1 or 3, S'] int32, S' at least tiles * KEYS
    row_offset: jax.Array,  # [B] int32
    key_blocks: jax.Array,  # [B, COMPUTE * tiles] int32: which 64 keys each warpgroup takes
    counts: jax.Array,  # [B, tiles, 2] int32: entries that are full for both halves, all entries
    entries: jax.Array,  # [B, tiles, blocks] int32: blocks of 64 rows, full ones first
    *,
    scale: float,
    config: Config,
    wanted: tuple[str, ...] = ("dk", "dv"),
    splits: int = 1,
) -> tuple[jax.Array, ...]:
    """The gradients of k and v that are `wanted`.

    A tile is any two blocks of keys, best such that are seen by the same rows: where only one of
    them is seen, half of the tile waits. An entry holds the block of rows in its high bits and,
    KIND_BITS for each warpgroup, whether its keys are seen by any of those rows. T' is at least
    64 * blocks.

    Returns [B, S, K, H] each; with `splits`, which divides N // K, the sums over each of so many
    parts of the query heads, [splits, B, tiles * KEYS, K, H] float32: more programs, where there
    are few tiles and the first ones have most of the work.
    """
    B, _, N, H = q.shape
    K, tiles = k.shape[2], counts.shape[1]
    G = N // K
    heads = G // splits
    stages, dtype = config.stages, q.dtype
    want_dk, want_dv = "dk" in wanted, "dv" in wanted
    shape = (UNIT, UNIT)

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, shift_ref, vector_ref, offset_ref,
               key_block_ref, count_ref, entry_ref, *refs):  # fmt: skip
        out_refs, (k_smem, v_smem, q_smem, do_smem, lse_smem, shift_smem, k_ready, ready, free) = (
            refs[: len(wanted)],
            refs[len(wanted) :],
        )
        wg = lax.axis_index("wg")
        program = lax.axis_index("program")
        kv_head, rest = lax.rem(program, K), lax.div(program, K)
        part, rest = lax.rem(rest, splits), lax.div(rest, splits)
        b, tile = lax.div(rest, tiles), lax.rem(rest, tiles)
        unmasked, steps = count_ref[b, tile, 0] * heads, count_ref[b, tile, 1] * heads

        def entry_of(step):
            """The query heads of a group follow each other, block by block."""
            return entry_ref[b, tile, lax.div(step, heads)]

        def row_of(entry):
            return lax.shift_right_logical(entry, COMPUTE * KIND_BITS) * UNIT

        @pl.when(wg == COMPUTE)
        def _fetch():
            plgpu.set_max_registers(24, action="decrease")

            @pl.loop(0, steps)
            def _(step):
                slot, row = lax.rem(step, stages), row_of(entry_of(step))
                head = kv_head * G + part * heads + lax.rem(step, heads)
                rows, of_rows = (b, pl.ds(row, UNIT), head), (b, head, pl.ds(row, UNIT))
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                for ref, index, smem in (
                    (q_ref, rows, q_smem),
                    (do_ref, rows, do_smem),
                    (lse_ref, of_rows, lse_smem),
                    (shift_ref, of_rows, shift_smem),
                ):
                    plgpu.copy_gmem_to_smem(ref.at[index], smem.at[slot], ready.at[slot])

        @pl.when(wg < COMPUTE)
        def _accumulate():
            plgpu.set_max_registers(240, action="increase")
            key = key_block_ref[b, tile * COMPUTE + wg] * UNIT
            keys = (b, pl.ds(key, UNIT), kv_head)
            my_k, my_v = k_smem.at[wg], v_smem.at[wg]
            plgpu.copy_gmem_to_smem(k_ref.at[keys], my_k, k_ready.at[wg])
            plgpu.copy_gmem_to_smem(v_ref.at[keys], my_v, k_ready.at[wg])
            plgpu.barrier_wait(k_ready.at[wg])

            def accumulate(step, sums, masked):
                slot = lax.rem(step, stages)

                def products(refs):
                    *sum_refs, s_ref, dp_ref = refs
                    plgpu.wgmma(s_ref, my_k, mosaic.transposed(q_smem.at[slot]))
                    if want_dk:
                        plgpu.wgmma(dp_ref, my_v, mosaic.transposed(do_smem.at[slot]))
                    lse_rows = mosaic.down(mosaic.load(lse_smem.at[slot], mosaic.DOWN), shape)
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=int(want_dk))
                    p = jnp.exp2(s * (scale * LOG2E) - lse_rows)
                    if masked:
                        row = row_of(entry_of(step)) + offset_ref[b]
                        of_keys = [
                            mosaic.load(vector_ref.at[b, n, pl.ds(key, UNIT)], mosaic.ACROSS)
                            for n in range(vectors.shape[1])
                        ]
                        p = jnp.where(visible_rows(row, key, of_keys), p, 0.0)
                    if want_dv:
                        plgpu.wgmma(sum_refs[-1], p.astype(dtype), do_smem.at[slot])
                    if want_dk:
                        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=int(want_dv))
                        shift_rows = mosaic.load(shift_smem.at[slot], mosaic.DOWN)
                        ds = p * (dp + mosaic.down(shift_rows, shape))
                        plgpu.wgmma(sum_refs[0], ds.astype(dtype), q_smem.at[slot])

                square = mosaic.accumulator(shape)
                refs = (*(plgpu.ACC.init(x) for x in (*sums, square, square)),)
                return pl.run_state(products)(refs)[: len(wanted)]

            def full(step, sums):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(ready.at[slot])
                sums = accumulate(step, sums, masked=False)
                plgpu.barrier_arrive(free.at[slot])
                return sums

            def mixed(step, sums):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(ready.at[slot])
                kind = lax.shift_right_logical(entry_of(step), wg * KIND_BITS) & 3
                sums = lax.cond(
                    kind > 0, partial(accumulate, step, masked=True), lambda same: same, sums
                )
                plgpu.barrier_arrive(free.at[slot])
                return sums

            sums = tuple(mosaic.accumulator((UNIT, H)) for _ in wanted)
            sums = lax.fori_loop(0, unmasked, full, sums)
            sums = lax.fori_loop(unmasked, steps, mixed, sums)
            results = zip(wanted, sums, (my_k, my_v)[: len(wanted)], out_refs, strict=True)
            for name, total, smem, ref in results:
                total = total * scale if name == "dk" else total
                if splits > 1:
                    ref.at[part, b, pl.ds(key, UNIT), kv_head][...] = total
                    continue
                smem[...] = total.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem, ref.at[keys])
            plgpu.wait_smem_to_gmem(0)

    result = jax.ShapeDtypeStruct(k.shape, dtype)
    if splits > 1:
        result = jax.ShapeDtypeStruct((splits, B, tiles * KEYS, K, H), jnp.float32)

    return plgpu.kernel(
        kernel,
        out_type=tuple(result for _ in wanted),
        scratch_types=[
            mosaic.shared((COMPUTE, UNIT, H), dtype),
            mosaic.shared((COMPUTE, UNIT, H), dtype),
            mosaic.shared((stages, UNIT, H), dtype),
            mosaic.shared((stages, UNIT, H), dtype),
            plgpu.SMEM((stages, UNIT), jnp.float32),
            plgpu.SMEM((stages, UNIT), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        ],
        grid=(B * tiles * splits * K,),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, d_out, lse, shift, vectors, row_offset, key_blocks, counts, entries)
