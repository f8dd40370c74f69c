# SPDX-License-Identifier: Apache-2.0
"""Masked attention on Hopper, forward: a Pallas Mosaic GPU kernel.

Two compute warpgroups of 64 query rows each share the keys and values that a third fetches. They
take turns (FlashAttention-3, arXiv 2407.08608, section 3.1): one computes its softmax while the
other multiplies.

Masks are cut into blocks of 64 keys, but a step takes several blocks, wherever they lie, so that
the products stay wide. Each tile of queries has a list of the blocks that it needs, full ones
first: the loop over them holds no masking at all. In the steps that hold partial blocks, row i sees
key j iff i - j, read as unsigned, is below span[j] = max(until[j] - j, 0): one comparison for both
ends.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.masked_attention_mosaic_config import Config
from pallas_kernels.mosaic import COMPUTE, UNIT

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
# Stands for -inf where the difference of two of them has to be 0 and not NaN.
LOWEST = -1e30


def place(program, shape: tuple[int, int, int, int]):
    """(sequence, key head, tile, group of query heads) of a program of the grid over tiles of
    queries. Neighbours share keys; the last tiles, which see most, come first, so that short ones
    fill the gaps at the end."""
    _, K, tiles, groups = shape
    group, rest = lax.rem(program, groups), lax.div(program, groups)
    tile, rest = tiles - 1 - lax.rem(rest, tiles), lax.div(rest, tiles)
    kv_head, b = lax.rem(rest, K), lax.div(rest, K)
    return b, kv_head, tile, group


def rows_of(wg, tile, group, kv_head, G: int):
    """First row, and query head, of a compute warpgroup."""
    if mosaic.heads_per_tile(G) == 2:
        return tile * UNIT, kv_head * G + group * 2 + wg
    return tile * (2 * UNIT) + wg * UNIT, kv_head * G + group


def steps_of(count_ref, b, tile, units: int):
    """Steps of full blocks alone, and all steps."""
    full, needed = count_ref[b, tile, 0], count_ref[b, tile, 1]
    return lax.div(full, units), lax.div(needed + (units - 1), units)


def fetch_blocks(ref, b, head, blocks, to, ready):
    """Starts the copies of blocks of 64 rows of [B, S, K, H] into one slot of shared memory."""
    for unit, block in enumerate(blocks):
        keys = ref.at[b, pl.ds(block * UNIT, UNIT), head]
        plgpu.copy_gmem_to_smem(keys, to.at[pl.ds(unit * UNIT, UNIT)], ready)


def fetch_vectors(ref, b, blocks, to, ready):
    """Starts the copies of the mask's vectors [B, vectors, S] of those blocks."""
    for n in range(to.shape[0]):
        for unit, block in enumerate(blocks):
            entries = ref.at[b, n, pl.ds(block * UNIT, UNIT)]
            plgpu.copy_gmem_to_smem(entries, to.at[n, pl.ds(unit * UNIT, UNIT)], ready)


def visible_keys(blocks, row, vectors) -> jax.Array:
    """[UNIT, keys] bool: which keys of a step the rows from index `row` on see."""
    shape = (UNIT, len(blocks) * UNIT)
    i, j = mosaic.positions(shape, 0), mosaic.positions(shape, 1)
    base = row - blocks[0] * UNIT
    if len(blocks) == 2:
        base = jnp.where(j < UNIT, base, row - (blocks[1] - 1) * UNIT)

    def vector(n):
        return mosaic.down(mosaic.load(vectors.at[n], mosaic.DOWN), shape)

    sees = mosaic.unsigned(i - j + base) < mosaic.unsigned(vector(0))
    if vectors.shape[0] == 3:
        sees &= mosaic.unsigned(i - vector(1) + row) >= mosaic.unsigned(vector(2))
    return sees


def forward(
    q: jax.Array,  # [B, T, N, H] bfloat16 or float16
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    vectors: jax.Array,  # [B, 1 or 3, S'] int32: span, hidden_from, hidden_until - hidden_from
    row_offset: jax.Array,  # [B] int32
    counts: jax.Array,  # [B, tiles, 2] int32: full blocks, and needed ones
    indices: jax.Array,  # [B, tiles, blocks'] int32: the needed blocks of 64 keys, full ones first
    *,
    scale: float,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and natural log-sum-exp [B, N, tiles * tile_rows] float32.

    A list is filled up to whole steps with a block beyond the last key, and the vectors are padded
    to hold it, with span 0.
    """
    B, _, N, H = q.shape
    K, tiles = k.shape[2], counts.shape[1]
    G = N // K
    grid = (B, K, tiles, G // mosaic.heads_per_tile(G))
    keys, stages, dtype = config.units * UNIT, config.stages, q.dtype
    factor = scale * LOG2E

    def kernel(q_ref, k_ref, v_ref, vector_ref, offset_ref, count_ref, index_ref,
               out_ref, lse_ref, q_smem, k_smem, v_smem, vector_smem, lse_smem,
               q_ready, k_ready, v_ready, vector_ready, k_free, v_free, turn):  # fmt: skip
        wg = lax.axis_index("wg")
        b, kv_head, tile, group = place(lax.axis_index("program"), grid)
        unmasked, steps = steps_of(count_ref, b, tile, config.units)

        def blocks_of(step):
            return [index_ref[b, tile, step * config.units + unit] for unit in range(config.units)]

        @pl.when(wg == COMPUTE)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, steps)
            def _(step):
                slot, blocks = lax.rem(step, stages), blocks_of(step)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                fetch_blocks(k_ref, b, kv_head, blocks, k_smem.at[slot], k_ready.at[slot])
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))

                @pl.when(step >= unmasked)
                def _():
                    fetch_vectors(
                        vector_ref, b, blocks, vector_smem.at[slot], vector_ready.at[slot]
                    )

                fetch_blocks(v_ref, b, kv_head, blocks, v_smem.at[slot], v_ready.at[slot])

        @pl.when(wg < COMPUTE)
        def _attend():
            plgpu.set_max_registers(232, action="increase")
            row, head = rows_of(wg, tile, group, kv_head, G)
            rows = (b, pl.ds(row, UNIT), head)
            mine = q_smem.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[rows], mine, q_ready.at[wg])
            plgpu.barrier_wait(q_ready.at[wg])
            pl.when(steps > 0)(lambda: plgpu.barrier_wait(k_ready.at[0]))

            def swap():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def attend(step, carry, masked):
                acc, largest, total = carry
                slot = lax.rem(step, stages)

                def multiply_keys(ref):
                    plgpu.wgmma(ref, mine, mosaic.transposed(k_smem.at[slot]))
                    swap()
                    return ref[...]

                s = pl.run_scoped(multiply_keys, plgpu.ACC((UNIT, keys), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                if masked:
                    plgpu.barrier_wait(vector_ready.at[slot])
                    first = row + offset_ref[b]
                    s = jnp.where(
                        visible_keys(blocks_of(step), first, vector_smem.at[slot]), s, -jnp.inf
                    )
                peak = jnp.maximum(largest, s.max(axis=1) * factor)
                shrink = jnp.exp2(largest - peak)
                p = jnp.exp2(s * factor - mosaic.across(peak, s.shape))
                acc *= mosaic.across(shrink, acc.shape)
                total *= shrink
                narrow = p.astype(dtype)

                def wait_for_values():
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(v_ready.at[slot])
                    plgpu.barrier_wait(turn)

                # Where registers allow, the sum overlaps the other warpgroup's products.
                if H <= 128:
                    total += p.sum(axis=1)
                    acc, total, peak, narrow = lax.optimization_barrier((acc, total, peak, narrow))
                    wait_for_values()
                else:
                    wait_for_values()
                    total += p.sum(axis=1)

                def multiply_values(ref):
                    plgpu.wgmma(ref, narrow, v_smem.at[slot])
                    after = step + 1

                    @pl.when(after < steps)
                    def _():
                        plgpu.barrier_wait(k_ready.at[lax.rem(after, stages)])

                acc = pl.run_state(multiply_values)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, peak, total

            pl.when(wg == 1)(swap)
            start = (
                mosaic.accumulator((UNIT, H)),
                mosaic.column(UNIT, LOWEST),
                mosaic.column(UNIT, 0.0),
            )
            carry = lax.fori_loop(0, unmasked, partial(attend, masked=False), start)
            acc, peak, total = lax.fori_loop(unmasked, steps, partial(attend, masked=True), carry)
            pl.when(wg == 0)(swap)

            seen = jnp.where(total > 0.0, total, 1.0)
            mine[...] = (acc / mosaic.across(seen, acc.shape)).astype(dtype)
            lse_smem.at[wg][...] = jnp.where(total > 0.0, peak * LN2 + jnp.log(seen), -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out_ref.at[rows])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, head, pl.ds(row, UNIT)])
            plgpu.wait_smem_to_gmem(0)

    copies = plgpu.Barrier(num_arrivals=config.units, num_barriers=stages)
    vector_copies = plgpu.Barrier(num_arrivals=config.units * vectors.shape[1], num_barriers=stages)
    freed = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages)
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((B, N, tiles * mosaic.tile_rows(G)), jnp.float32),
        ),
        scratch_types=[
            mosaic.shared((COMPUTE, UNIT, H), dtype),
            mosaic.shared((stages, keys, H), dtype),
            mosaic.shared((stages, keys, H), dtype),
            plgpu.SMEM((stages, vectors.shape[1], keys), jnp.int32),
            plgpu.SMEM((COMPUTE, UNIT), jnp.float32),
            plgpu.Barrier(num_barriers=COMPUTE),
            copies,
            copies,
            vector_copies,
            freed,
            freed,
            plgpu.Barrier(num_arrivals=COMPUTE),
        ],
        grid=(math.prod(grid),),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, vectors, row_offset, counts, indices)
