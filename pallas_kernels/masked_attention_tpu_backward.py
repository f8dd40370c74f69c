# SPDX-License-Identifier: Apache-2.0
"""Backward kernels of the TPU attention: one for dq, which walks the key blocks of a query block,
and one for dk and dv, which walks the query blocks of a key block.

Two kernels compute the scores twice (seven products instead of five) but every gradient is summed
in VMEM: nothing is added to in HBM, and no partial dq is kept, which would take as many float32
copies of dq as there are key blocks. Grid, tiles and the transposed scores are those of the
forward kernel (`masked_attention_tpu`): keys along the sublanes, the G * rows queries along the
lanes, so the log-sum-exp and the shift of a row are used as they are stored, and p^T do and ds^T q
sum dk and dv over the G heads within one product.

With P = exp(scale q k^T - lse) and shift = d_lse - sum(out * d_out):

    dS = P * (d_out v^T + shift),  dv = P^T d_out,  dk = scale * dS^T q,  dq = scale * dS k

A row that sees nothing has log-sum-exp +inf here, which makes its P zero without a mask.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import masked_attention_tpu as shared
from pallas_kernels.masked_attention_tpu import (
    FIRST,
    FULL,
    LAST,
    LOG2_E,
    PARTIAL,
    BlockSizes,
    TileCode,
    product,
)


def _chunks(
    k_ref,  # [keys, H]
    v_ref,  # [keys, H]
    vectors_ref,  # [1 or 3, keys]
    q: jax.Array,  # [G * rows, H]
    d_out: jax.Array,  # [G * rows, H]
    lse: jax.Array,  # [1, G * rows], times log2(e)
    shift: jax.Array,  # [1, G * rows]
    first_key: jax.Array,
    first_row: jax.Array,
    *,
    rows: int,
    scale: float,
    blocks: BlockSizes,
    is_partial: bool,
):
    """Yields (slice of keys, weights, d scores / scale), both [step, G * rows] float32.

    The products of the next keys are issued before the element-wise work on the current ones, so
    that the compiler can run both at once.
    """

    def products(keys):
        return product(k_ref[keys, :], q, (1, 1)), product(v_ref[keys, :], d_out, (1, 1))

    chunks = [slice(start, start + blocks.step) for start in range(0, blocks.k, blocks.step)]
    following = products(chunks[0])
    for number, keys in enumerate(chunks):
        scores, d_weights = following
        if number + 1 < len(chunks):
            following = products(chunks[number + 1])
        scores = scores * (scale * LOG2_E)
        if is_partial:
            vectors = vectors_ref[:, keys]
            scores = shared.masked(scores, vectors, first_key + keys.start, first_row, rows)
        weights = jnp.exp2(scores - lse)
        yield keys, weights, weights * (d_weights + shift)


def _dq_kernel(
    # prefetched
    tiles,  # [L]
    offsets,  # [B]
    # inputs
    q_ref,  # [G, rows, H]
    k_ref,  # [keys, H]
    v_ref,  # [keys, H]
    vectors_ref,  # [1 or 3, keys]
    d_out_ref,  # [G, rows, H]
    lse_ref,  # [1, G * rows]
    shift_ref,  # [1, G * rows]
    # outputs
    dq_ref,  # [G, rows, H]
    # scratch
    sum_ref,  # [H, G * rows]
    *,
    code: TileCode,
    scale: float,
    blocks: BlockSizes,
):
    tile = tiles[pl.program_id(1)]
    flags = code.flags(tile)
    G, rows, H = q_ref.shape

    @pl.when((flags & FIRST) != 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(is_partial: bool) -> None:
        chunks = _chunks(
            k_ref,
            v_ref,
            vectors_ref,
            q_ref[...].reshape(G * rows, H),
            d_out_ref[...].reshape(G * rows, H),
            lse_ref[...],
            shift_ref[...],
            code.place(tile) * blocks.k,
            offsets[code.batch(tile)] + code.run(tile) * rows,
            rows=rows,
            scale=scale,
            blocks=blocks,
            is_partial=is_partial,
        )
        total = sum_ref[...]
        for keys, _, d_scores in chunks:
            total = total + product(k_ref[keys, :], d_scores.astype(k_ref.dtype), (0, 0))
        sum_ref[...] = total

    pl.when((flags & 3) == PARTIAL)(partial(add, True))
    pl.when((flags & 3) == FULL)(partial(add, False))

    @pl.when((flags & LAST) != 0)
    def _():
        dq = jnp.transpose(sum_ref[...] * scale)  # [G * rows, H]
        dq_ref[...] = dq.reshape(G, rows, H).astype(dq_ref.dtype)


def _dkv_kernel(
    # prefetched
    tiles,  # [L]
    offsets,  # [B]
    # inputs
    q_ref,  # [G, rows, H]
    k_ref,  # [keys, H]
    v_ref,  # [keys, H]
    vectors_ref,  # [1 or 3, keys]
    d_out_ref,  # [G, rows, H]
    lse_ref,  # [1, G * rows]
    shift_ref,  # [1, G * rows]
    # outputs
    dk_ref,  # [keys, H]
    dv_ref,  # [keys, H]
    # scratch
    dk_sum_ref,  # [keys, H]
    dv_sum_ref,  # [keys, H]
    *,
    code: TileCode,
    scale: float,
    blocks: BlockSizes,
):
    tile = tiles[pl.program_id(1)]
    flags = code.flags(tile)
    G, rows, H = q_ref.shape

    @pl.when((flags & FIRST) != 0)
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    def add(is_partial: bool) -> None:
        q = q_ref[...].reshape(G * rows, H)
        d_out = d_out_ref[...].reshape(G * rows, H)
        chunks = _chunks(
            k_ref,
            v_ref,
            vectors_ref,
            q,
            d_out,
            lse_ref[...],
            shift_ref[...],
            code.run(tile) * blocks.k,
            offsets[code.batch(tile)] + code.place(tile) * rows,
            rows=rows,
            scale=scale,
            blocks=blocks,
            is_partial=is_partial,
        )
        for keys, weights, d_scores in chunks:
            dv_sum_ref[keys, :] += product(weights.astype(d_out.dtype), d_out, (1, 0))
            dk_sum_ref[keys, :] += product(d_scores.astype(q.dtype), q, (1, 0))

    pl.when((flags & 3) == PARTIAL)(partial(add, True))
    pl.when((flags & 3) == FULL)(partial(add, False))

    @pl.when((flags & LAST) != 0)
    def _():
        dk_ref[...] = (dk_sum_ref[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)


def d_queries(
    q: jax.Array,  # [B, K, G, T, H], T a multiple of blocks.q
    k: jax.Array,  # [B, K, S, H], S a multiple of blocks.k
    v: jax.Array,  # [B, K, S, H]
    vectors: jax.Array,  # [B, 1 or 3, S] int32: until, hidden_from, hidden_until
    d_out: jax.Array,  # [B, K, G, T, H]
    lse: jax.Array,  # [B, K, T / rows, 1, G * rows] float32, times log2(e); +inf for blind rows
    shift: jax.Array,  # [B, K, T / rows, 1, G * rows] float32
    offsets: jax.Array,  # [B] int32: index of the first row
    tiles: jax.Array,  # [L] int32, runs over query blocks
    count: jax.Array,  # int32, how many entries of tiles there are
    *,
    scale: float,
    blocks: BlockSizes,
    vmem_bytes: int,
    interpret: pltpu.InterpretParams | None = None,
) -> jax.Array:  # [B, K, G, T, H] in q.dtype
    _, _, G, T, H = q.shape
    code = TileCode(T // blocks.q, k.shape[2] // blocks.k)
    return _call(
        partial(_dq_kernel, code=code, scale=scale, blocks=blocks),
        (q, k, v, vectors, d_out, lse, shift),
        (tiles, offsets, count),
        code,
        (code.run, code.place),
        blocks,
        outputs=[(shared.row_spec(code, G, blocks.q, H, code.run), q)],
        scratch=[(H, G * blocks.q)],
        products=3,
        vmem_bytes=vmem_bytes,
        interpret=interpret,
        name="masked_attention_dq",
    )[0]


def d_keys_and_values(
    q: jax.Array,  # [B, K, G, T, H], T a multiple of blocks.q
    k: jax.Array,  # [B, K, S, H], S a multiple of blocks.k
    v: jax.Array,  # [B, K, S, H]
    vectors: jax.Array,  # [B, 1 or 3, S] int32: until, hidden_from, hidden_until
    d_out: jax.Array,  # [B, K, G, T, H]
    lse: jax.Array,  # [B, K, T / rows, 1, G * rows] float32, times log2(e); +inf for blind rows
    shift: jax.Array,  # [B, K, T / rows, 1, G * rows] float32
    offsets: jax.Array,  # [B] int32: index of the first row
    tiles: jax.Array,  # [L] int32, runs over key blocks
    count: jax.Array,  # int32, how many entries of tiles there are
    *,
    scale: float,
    blocks: BlockSizes,
    vmem_bytes: int,
    interpret: pltpu.InterpretParams | None = None,
) -> tuple[jax.Array, jax.Array]:  # [B, K, S, H] each, in k.dtype and v.dtype
    _, _, _, T, H = q.shape
    code = TileCode(k.shape[2] // blocks.k, T // blocks.q)
    keys = shared.key_spec(code, blocks.k, H, code.run)
    return tuple(
        _call(
            partial(_dkv_kernel, code=code, scale=scale, blocks=blocks),
            (q, k, v, vectors, d_out, lse, shift),
            (tiles, offsets, count),
            code,
            (code.place, code.run),
            blocks,
            outputs=[(keys, k), (keys, v)],
            scratch=[(blocks.k, H), (blocks.k, H)],
            products=4,
            vmem_bytes=vmem_bytes,
            interpret=interpret,
            name="masked_attention_dkv",
        )
    )


def _call(
    kernel,
    inputs,
    lists,
    code: TileCode,
    find,
    blocks: BlockSizes,
    *,
    outputs,
    scratch,
    products: int,
    vmem_bytes: int,
    interpret: pltpu.InterpretParams | None,
    name: str,
):
    """`find` says where a tile keeps its query block and its key block."""
    q, k, _, vectors = inputs[:4]
    tiles, offsets, count = lists
    _, K, G, _, H = q.shape
    find_q, find_k = find
    rows = shared.row_spec(code, G, blocks.q, H, find_q)
    statistics = shared.statistic_spec(code, G * blocks.q, find_q)
    keys = shared.key_spec(code, blocks.k, H, find_k)
    axes = jax.typeof(q).manual_axis_type
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(K, count),
            in_specs=[
                rows,
                keys,
                keys,
                shared.vector_spec(code, vectors.shape[1], blocks.k, find_k),
                rows,
                statistics,
                statistics,
            ],
            out_specs=[spec for spec, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(like.shape, like.dtype, manual_axis_type=axes)
            for _, like in outputs
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        cost_estimate=shared.cost(q, k, products=products, outputs=2),
        interpret=interpret if interpret is not None else False,
        name=name,
    )(tiles, offsets, *inputs)
