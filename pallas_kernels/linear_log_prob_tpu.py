# SPDX-License-Identifier: Apache-2.0
"""Linear layer and log-softmax on TPU without logits in HBM: the forward kernel and that of dw.

`forward` walks the vocabulary for a block of rows with an online softmax (Milakov and Gimelshein,
arXiv 1805.02867), as attention walks keys, and like attention it can weigh values on the way: the
values are the rows of w again. With p the softmax and c the derivative of the cap,

    mean = sum over columns v that are not the target of p_v c_v w_v

gives dx = d_lse * mean + (d_lse * p_t + d_target) * c_t * w_t for any cotangents, which only scale
rows. The target is left out because 1 - p_t would drown in the rounding of p_t near 1. `gradient`
computes the logits again for dw. That is four products with a cotangent for each row, where two
kernels that both recompute would take five, and neither logits nor a sum of dw pass through HBM.

Everything is transposed, as in `masked_attention_tpu`: logits are [columns, rows], so that maxima
and sums over the vocabulary are element-wise between registers and statistics are dense [1, rows].

Grid of `forward`: (blocks of rows, blocks of the vocabulary); of `gradient` the other way round. A
list has the blocks of rows with a target first: only these are visited by `gradient`, whose inner
bound is their run-time number, and fetched and computed by `forward`, whose cores share rows. Nor
are blocks of columns beyond `limit`.
Per step and byte fetched: `forward` 2 rows FLOPs with the mean and rows without, `gradient` 2
columns: with 1024 rows and 512 columns at least 1024, beyond every chip's ridge (v6e 574, v5e 240).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.masked_attention_tpu import LANES, product

ABSENT = -1  # in place of a target that is no column here


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Rows of x and columns (rows of w) of a tile, and how many columns are computed at a time."""

    rows: int
    columns: int
    step: int

    def __post_init__(self) -> None:
        multiples = self.rows % LANES or self.columns % LANES or self.step % LANES
        if multiples or self.columns % self.step or min(self.rows, self.columns, self.step) < 1:
            raise ValueError(f"blocks are multiples of {LANES}, and step divides columns: {self}")

    def vmem_bytes(self, D: int, itemsize: int) -> int:
        """Of the larger kernel, `forward` with the mean: two copies of each block on its way, the
        sum, and about six arrays of logits."""
        blocks = 2 * (2 * self.rows + self.columns) * D * itemsize
        return blocks + 4 * self.rows * D + 6 * 4 * self.step * self.rows


# Chosen by calculation (above), not measured; cut until they fit.
_LARGEST = BlockSizes(1024, 512, 256)


def block_sizes(num_rows: int, D: int, vocab: int, itemsize: int, vmem_bytes: int) -> BlockSizes:
    """The largest blocks that fit `vmem_bytes` and are no larger than the arrays need.

    Raises ValueError where even the smallest do not fit.
    """
    rows, columns = _LARGEST.rows, _LARGEST.columns
    while BlockSizes(rows, columns, LANES).vmem_bytes(D, itemsize) > vmem_bytes:
        if rows == columns == LANES:
            raise ValueError(f"a tile of {D} columns does not fit {vmem_bytes >> 20} MiB")
        rows, columns = (rows // 2, columns) if rows > columns else (rows, columns // 2)
    number = -(-num_rows // rows)
    rows = -(-num_rows // (number * LANES)) * LANES
    columns = min(columns, -(-vocab // LANES) * LANES)
    step = LANES if columns % _LARGEST.step else _LARGEST.step
    if BlockSizes(rows, columns, step).vmem_bytes(D, itemsize) > vmem_bytes:
        step = LANES
    return BlockSizes(rows, columns, step)


def _capped(logits: jax.Array, softcap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Capped logits and the derivative of the cap, None for 1."""
    if softcap is None:
        return logits, None
    bent = jnp.tanh(logits / softcap)
    return softcap * bent, 1.0 - bent * bent


def _tiles(x_ref, w_ref, first, limit, blocks: BlockSizes):
    """Yields (rows of w, logits before the cap, their columns) step by step; the product of the
    next step is issued before the work on the current one, so that the compiler can run both at
    once. Rows of w beyond the limit are zero: beyond the array there may be anything, and 0 * NaN
    is NaN."""

    def multiplied(start):
        rows = w_ref[start : start + blocks.step, :]
        place = first + start + jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        rows = jnp.where(place < limit, rows, jnp.zeros_like(rows))
        return rows, product(rows, x, (1, 1))

    x = x_ref[...]
    following = multiplied(0)
    for start in range(0, blocks.columns, blocks.step):
        rows, logits = following
        if start + blocks.step < blocks.columns:
            following = multiplied(start + blocks.step)
        yield rows, logits, first + start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)


def _forward_kernel(
    # prefetched
    order,  # [row blocks]
    bounds,  # [2]: blocks of rows with a target, columns that count
    # inputs
    x_ref,  # [rows, D]
    w_ref,  # [columns, D]
    target_ref,  # [1, rows]
    # outputs
    lse_ref,  # [1, rows]
    chosen_ref,  # [1, rows]
    *rest,  # output mean [rows, D] if with_mean, then scratch
    softcap: float | None,
    blocks: BlockSizes,
    with_mean: bool,
):
    del order
    mean_ref, *scratch = rest if with_mean else (None, *rest)
    largest_ref, total_ref, sum_ref, *weighted_ref = scratch
    block, limit = pl.program_id(1), jnp.where(pl.program_id(0) < bounds[0], bounds[1], 0)
    first = block * blocks.columns

    @pl.when(block == 0)
    def _():
        largest_ref[...] = jnp.full_like(largest_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        for ref in weighted_ref:
            ref[...] = jnp.zeros_like(ref)

    @pl.when(first < limit)
    def _():
        target = target_ref[...]
        largest, total, chosen = largest_ref[...], total_ref[...], sum_ref[...]
        weighted = weighted_ref[0][...] if with_mean else None
        for rows, logits, column in _tiles(x_ref, w_ref, first, limit, blocks):
            logits, slope = _capped(logits, softcap)
            is_target = column == target
            chosen += jnp.sum(jnp.where(is_target, logits, 0.0), axis=0, keepdims=True)
            logits = jnp.where(column < limit, logits, -jnp.inf)
            before = largest
            largest = jnp.maximum(largest, jnp.max(logits, axis=0, keepdims=True))
            base = jnp.where(largest == -jnp.inf, 0.0, largest)
            weights, rescale = jnp.exp(logits - base), jnp.exp(before - base)
            total = total * rescale + jnp.sum(weights, axis=0, keepdims=True)
            if with_mean:
                weights = jnp.where(is_target, 0.0, weights)
                weights = weights if slope is None else weights * slope
                weighted = weighted * rescale + product(rows, weights.astype(rows.dtype), (0, 0))
        largest_ref[...], total_ref[...], sum_ref[...] = largest, total, chosen
        if with_mean:
            weighted_ref[0][...] = weighted

    @pl.when(block == pl.num_programs(1) - 1)
    def _():
        total = total_ref[...]
        some = total > 0
        total = jnp.where(some, total, 1.0)
        lse_ref[...] = jnp.where(some, largest_ref[...] + jnp.log(total), -jnp.inf)
        chosen_ref[...] = jnp.where(target_ref[...] >= 0, sum_ref[...], -jnp.inf)
        if with_mean:
            mean_ref[...] = jnp.transpose(weighted_ref[0][...] / total).astype(mean_ref.dtype)


def _gradient_kernel(
    # prefetched
    order,  # [row blocks]
    bounds,  # [2]: blocks of rows with a target, columns that count
    # inputs
    x_ref,  # [rows, D]
    w_ref,  # [columns, D]
    target_ref,  # [1, rows]
    lse_ref,  # [1, rows], +inf for rows that count for nothing
    d_lse_ref,  # [1, rows]
    d_target_ref,  # [1, rows]
    # output
    dw_ref,  # [columns, D]
    # scratch
    sum_ref,  # [columns, D]
    *,
    softcap: float | None,
    blocks: BlockSizes,
):
    del order
    step, limit = pl.program_id(1), bounds[1]
    first = pl.program_id(0) * blocks.columns

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(first < limit)
    def _():
        target, lse = target_ref[...], lse_ref[...]
        d_lse, d_target = d_lse_ref[...], d_target_ref[...]
        x = x_ref[...]
        place = 0
        for _, logits, column in _tiles(x_ref, w_ref, first, limit, blocks):
            logits, slope = _capped(logits, softcap)
            d = d_lse * jnp.exp(logits - lse) + jnp.where(column == target, d_target, 0.0)
            d = jnp.where(column < limit, d if slope is None else d * slope, 0.0)
            sum_ref[place : place + blocks.step, :] += product(d.astype(x.dtype), x, (1, 0))
            place += blocks.step

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)


def forward(
    x: jax.Array,  # [R, D], R a multiple of blocks.rows
    w: jax.Array,  # [V, D]
    targets: jax.Array,  # [1, R] int32, below limit, or ABSENT
    order: jax.Array,  # [R / rows] int32: the blocks of rows, those to compute first
    bounds: jax.Array,  # [2] int32: how many to compute, at least 1; columns that are not excluded
    *,
    softcap: float | None,
    blocks: BlockSizes,
    with_mean: bool,
    vmem_bytes: int,
    interpret: pltpu.InterpretParams | None = None,
) -> tuple[jax.Array, ...]:
    """Log-sum-exp and the target's logit, [1, R] float32, -inf where there is none; with_mean also
    the mean [R, D] in x.dtype. Blocks of rows that are not computed get -inf, and 0."""
    R, D = x.shape
    of_rows, of_columns, statistic = _specs(blocks, D, rows_first=True)
    statistics = ((1, R), jnp.float32)
    outputs = [(statistic, *statistics), (statistic, *statistics)]
    scratch = [pltpu.VMEM((1, blocks.rows), jnp.float32) for _ in range(3)]
    if with_mean:
        outputs.append((of_rows, x.shape, x.dtype))
        scratch.append(pltpu.VMEM((D, blocks.rows), jnp.float32))
    return _call(
        partial(_forward_kernel, softcap=softcap, blocks=blocks, with_mean=with_mean),
        (x, w, targets),
        (order, bounds),
        (R // blocks.rows, pl.cdiv(w.shape[0], blocks.columns)),
        [of_rows, of_columns, statistic],
        outputs,
        scratch,
        products=2 if with_mean else 1,
        fetched=x.nbytes + R // blocks.rows * w.nbytes,
        vmem_bytes=vmem_bytes,
        interpret=interpret,
        name="linear_log_prob_forward",
    )


def gradient(
    x: jax.Array,  # [R, D], R a multiple of blocks.rows
    w: jax.Array,  # [V, D]
    targets: jax.Array,  # [1, R] int32, below limit, or ABSENT
    lse: jax.Array,  # [1, R] float32, +inf for rows that count for nothing
    d_lse: jax.Array,  # [1, R] float32
    d_target: jax.Array,  # [1, R] float32
    order: jax.Array,  # [R / rows] int32, as in `forward`
    bounds: jax.Array,  # [2] int32
    *,
    softcap: float | None,
    blocks: BlockSizes,
    vmem_bytes: int,
    interpret: pltpu.InterpretParams | None = None,
) -> jax.Array:  # [V, D] in w.dtype
    D = x.shape[1]
    of_rows, of_columns, statistic = _specs(blocks, D, rows_first=False)
    number = pl.cdiv(w.shape[0], blocks.columns)
    out = pl.BlockSpec((blocks.columns, D), lambda column, row, order, bounds: (column, 0))
    return _call(
        partial(_gradient_kernel, softcap=softcap, blocks=blocks),
        (x, w, targets, lse, d_lse, d_target),
        (order, bounds),
        (number, bounds[0]),
        [of_rows, of_columns, *[statistic] * 4],
        [(out, w.shape, w.dtype)],
        [pltpu.VMEM((blocks.columns, D), jnp.float32)],
        products=2,
        fetched=number * x.nbytes + w.nbytes,
        vmem_bytes=vmem_bytes,
        interpret=interpret,
        name="linear_log_prob_gradient",
    )[0]


def _specs(blocks: BlockSizes, D: int, rows_first: bool):
    """Blocks of x, w and [1, R] statistics, on a grid of rows and columns or the reverse."""

    def spec(shape, find):
        def index(first, second, order, bounds):
            row, column = (first, second) if rows_first else (second, first)
            last = jnp.maximum(bounds[1] - 1, 0) // blocks.columns
            column = jnp.where(row < bounds[0], jnp.minimum(column, last), last)
            return find(order[row], column)

        return pl.BlockSpec(shape, index)

    return (
        spec((blocks.rows, D), lambda row, column: (row, 0)),
        spec((blocks.columns, D), lambda row, column: (column, 0)),
        spec((1, blocks.rows), lambda row, column: (0, row)),
    )


def _call(
    kernel,
    inputs,
    prefetched,
    grid,
    in_specs,
    outputs,
    scratch,
    *,
    products: int,
    fetched: int,
    vmem_bytes: int,
    interpret: pltpu.InterpretParams | None,
    name: str,
) -> tuple[jax.Array, ...]:
    x, w = inputs[:2]
    axes = jax.typeof(x).manual_axis_type
    out_shape = [
        jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes) for _, shape, dtype in outputs
    ]
    results = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=in_specs,
            out_specs=[spec for spec, _, _ in outputs],
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        # the blocks that have a target are not known when the program is compiled: all of them
        cost_estimate=pl.CostEstimate(
            flops=2 * products * x.size * w.shape[0],
            transcendentals=x.shape[0] * w.shape[0],
            bytes_accessed=fetched + sum(shape.size * shape.dtype.itemsize for shape in out_shape),
        ),
        interpret=interpret if interpret is not None else False,
        name=name,
    )(*prefetched, *inputs)
    return tuple(results)
