# SPDX-License-Identifier: Apache-2.0
"""Attention over a list of needed tiles on TPU: forward, and what the backward kernels share.

A tile is a query block times a key block for all G query heads of one KV head. The grid is (KV
heads, needed tiles): its second bound is a run-time scalar, so a mask costs exactly the tiles that
it needs, and there are no empty steps as in a grid of query blocks x longest list. The list is one
int32 per tile in SMEM (`TileCode`), read by the index maps, so only needed blocks are fetched; the
tiles of one query block follow each other and its state stays in VMEM.

Everything is transposed: scores are [keys, G * rows], rows along the lanes. Maxima and sums over
keys are then element-wise between registers, the statistics of a row are dense [1, rows] vectors
(with rows along the sublanes they would fill one lane in 128), and the log-sum-exp is stored as it
is. The output is turned once per query block. Folding the G heads into rows makes long rows of
lanes, loads every key block once for all of them, and sums dk and dv over them inside the products.

Forward, per tile: 4 * G * rows * keys * H FLOPs on (keys * 2 H + vectors) elements fetched; with
1024 rows, 512 bytes per key and head dim 128 that is 1024 FLOPs per byte, beyond every chip's
ridge, so the MXU and the exponentials decide.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

EMPTY, PARTIAL, FULL = 0, 1, 2  # kinds of tiles; an EMPTY one only zeroes a block that sees nothing
FIRST, LAST = 4, 8  # flags: the tile opens or closes its run
_FLAG_BITS = 4
LOG2_E = 1.4426950408889634
LANES = 128


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Rows (of each query head) and keys of a tile, and how many keys are computed at a time."""

    q: int
    k: int
    step: int

    def __post_init__(self) -> None:
        if self.q % LANES or self.k % LANES or self.k % self.step or self.step % LANES:
            raise ValueError(f"blocks are multiples of {LANES}, and step divides k: {self}")


# Query rows (over all G heads) and keys of a tile by chip and head dim. Chosen by calculation, not
# measured: the schedules that the compiler prints fill the matrix units on v5e at 1024 x 512, and
# leave them waiting for the exponentials on v6e, where longer rows hide more of it. Two chunks of
# step x rows float32 scores, weights and their gradients take most of VMEM: 8 MiB at 256 x 1024, 16
# at 256 x 2048, beside 1 to 4 MiB of blocks.
_TILES = {
    "TPU v5 lite": {64: (1024, 512), 128: (1024, 512), 256: (1024, 512)},
    "TPU v5": {64: (1024, 512), 128: (1024, 512), 256: (1024, 512)},
    "TPU v6 lite": {64: (2048, 512), 128: (2048, 512), 256: (1024, 512)},
    "TPU7x": {64: (2048, 512), 128: (2048, 512), 256: (1024, 512)},
}
_STEP = 256
_VMEM_BYTES = {"TPU v5 lite": 96 << 20, "TPU v6 lite": 96 << 20}  # three quarters of what there is
_SMALLEST_VMEM_BYTES = 48 << 20


def block_sizes(
    chip: str | None, head_dim: int, group: int, num_rows: int, num_keys: int, itemsize: int
) -> BlockSizes:
    """Blocks for a device kind (None: any), cut to the arrays. Float32 takes half the rows."""
    rows, keys = _TILES.get(chip, _TILES["TPU v5"])[head_dim]
    rows = rows * 2 // itemsize // group
    return fit(BlockSizes(max(rows // LANES, 1) * LANES, keys, LANES), num_rows, num_keys)


def fit(blocks: BlockSizes, num_rows: int, num_keys: int) -> BlockSizes:
    """As few blocks as `blocks` would need, but of nearly equal size."""

    def even(length: int, block: int) -> int:
        number = -(-length // block)
        return -(-length // (number * LANES)) * LANES

    keys = even(num_keys, blocks.k)
    return BlockSizes(even(num_rows, blocks.q), keys, LANES if keys % _STEP else _STEP)


def vmem_bytes(chip: str | None) -> int:
    return _VMEM_BYTES.get(chip, _SMALLEST_VMEM_BYTES)


@dataclasses.dataclass(frozen=True)
class TileCode:
    """How a tile is written in one int32: sequence, run, place, flags and kind, so that sorting the
    codes orders the tiles.

    A run is the block that stays in VMEM (queries in the forward and dq kernels, keys in the dk/dv
    kernel), the place is the block of the other side. What fits scalar memory fits the 31 bits.
    """

    num_runs: int
    num_places: int

    @property
    def _run_bits(self) -> int:
        return (self.num_runs - 1).bit_length()

    @property
    def _place_bits(self) -> int:
        return (self.num_places - 1).bit_length()

    def pack(self, batch, run, place, flags):
        return (((batch << self._run_bits | run) << self._place_bits | place) << _FLAG_BITS) | flags

    def flags(self, tile):
        return tile & ((1 << _FLAG_BITS) - 1)

    def place(self, tile):
        return (tile >> _FLAG_BITS) & ((1 << self._place_bits) - 1)

    def run(self, tile):
        return (tile >> (_FLAG_BITS + self._place_bits)) & ((1 << self._run_bits) - 1)

    def batch(self, tile):
        return tile >> (_FLAG_BITS + self._place_bits + self._run_bits)


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Float32 product over dimension contract[0] of a and contract[1] of b; float32 inputs are
    multiplied in full, whatever `jax_default_matmul_precision` says."""
    in_full = a.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if in_full else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def masked(
    scores: jax.Array,  # [keys, G * rows]
    vectors: jax.Array,  # [1 or 3, keys] int32: until, hidden_from, hidden_until
    first_key: jax.Array,
    first_row: jax.Array,
    rows: int,
) -> jax.Array:
    """Scores with -inf where the row does not see the key; one mask serves the G heads."""
    keys, width = scores.shape
    columns = jnp.transpose(jnp.broadcast_to(vectors[:1], (8, keys)))
    key = first_key + jax.lax.broadcasted_iota(jnp.int32, (keys, rows), 0)
    row = first_row + jax.lax.broadcasted_iota(jnp.int32, (keys, rows), 1)
    seen = (key <= row) & (row < columns[:, :1])
    if vectors.shape[0] == 3:
        start = jnp.transpose(jnp.broadcast_to(vectors[1:2], (8, keys)))[:, :1]
        end = jnp.transpose(jnp.broadcast_to(vectors[2:3], (8, keys)))[:, :1]
        seen &= (row < start) | (row >= end)
    heads = [
        jnp.where(seen, scores[:, start : start + rows], -jnp.inf)
        for start in range(0, width, rows)
    ]
    return jnp.concatenate(heads, axis=1) if len(heads) > 1 else heads[0]


def _forward_kernel(
    # prefetched
    tiles,  # [L]
    offsets,  # [B]
    # inputs
    q_ref,  # [G, rows, H]
    k_ref,  # [keys, H]
    v_ref,  # [keys, H]
    vectors_ref,  # [1 or 3, keys]
    # outputs
    out_ref,  # [G, rows, H]
    lse_ref,  # [1, G * rows]
    # scratch
    largest_ref,  # [1, G * rows]
    total_ref,  # [1, G * rows]
    weighted_ref,  # [H, G * rows]
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
        largest_ref[...] = jnp.full_like(largest_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)
        weighted_ref[...] = jnp.zeros_like(weighted_ref)

    def add(is_partial: bool) -> None:
        q = q_ref[...].reshape(G * rows, H)
        first_key = code.place(tile) * blocks.k
        first_row = offsets[code.batch(tile)] + code.run(tile) * rows
        largest, total, weighted = largest_ref[...], total_ref[...], weighted_ref[...]
        # The scores of the next keys are multiplied before the softmax of the current ones, so that
        # the compiler can run both at once; a state in registers does not order them.
        chunks = [slice(start, start + blocks.step) for start in range(0, blocks.k, blocks.step)]
        following = product(k_ref[chunks[0], :], q, (1, 1))
        for number, keys in enumerate(chunks):
            scores = following * (scale * LOG2_E)
            if number + 1 < len(chunks):
                following = product(k_ref[chunks[number + 1], :], q, (1, 1))
            if is_partial:
                vectors = vectors_ref[:, keys]
                scores = masked(scores, vectors, first_key + keys.start, first_row, rows)
            before, largest = largest, jnp.maximum(largest, jnp.max(scores, axis=0, keepdims=True))
            base = jnp.where(largest == -jnp.inf, 0.0, largest) if is_partial else largest
            weights = jnp.exp2(scores - base)
            rescale = jnp.exp2(before - base)
            total = total * rescale + jnp.sum(weights, axis=0, keepdims=True)
            values = product(v_ref[keys, :], weights.astype(v_ref.dtype), (0, 0))
            weighted = weighted * rescale + values
        largest_ref[...], total_ref[...], weighted_ref[...] = largest, total, weighted

    pl.when((flags & 3) == PARTIAL)(partial(add, True))
    pl.when((flags & 3) == FULL)(partial(add, False))

    @pl.when((flags & LAST) != 0)
    def _():
        total = total_ref[...]
        sees = total > 0
        total = jnp.where(sees, total, 1.0)
        lse = (largest_ref[...] + jnp.log2(total)) / LOG2_E
        lse_ref[...] = jnp.where(sees, lse, -jnp.inf)
        out = jnp.transpose(weighted_ref[...] / total)  # [G * rows, H]
        out_ref[...] = out.reshape(G, rows, H).astype(out_ref.dtype)


def row_spec(code: TileCode, G: int, rows: int, H: int, find) -> pl.BlockSpec:
    """Blocks of arrays [B, K, G, T, H]; `find` is TileCode.run or TileCode.place."""

    def index(head, step, tiles, offsets):
        tile = tiles[step]
        return code.batch(tile), head, 0, find(tile), 0

    return pl.BlockSpec((None, None, G, rows, H), index)


def statistic_spec(code: TileCode, width: int, find) -> pl.BlockSpec:
    """Blocks of arrays [B, K, T / rows, 1, G * rows]."""

    def index(head, step, tiles, offsets):
        tile = tiles[step]
        return code.batch(tile), head, find(tile), 0, 0

    return pl.BlockSpec((None, None, None, 1, width), index)


def key_spec(code: TileCode, keys: int, H: int, find) -> pl.BlockSpec:
    """Blocks of arrays [B, K, S, H]."""

    def index(head, step, tiles, offsets):
        tile = tiles[step]
        return code.batch(tile), head, find(tile), 0

    return pl.BlockSpec((None, None, keys, H), index)


def vector_spec(code: TileCode, number: int, keys: int, find) -> pl.BlockSpec:
    """Blocks of arrays [B, 1 or 3, S]."""

    def index(head, step, tiles, offsets):
        tile = tiles[step]
        return code.batch(tile), 0, find(tile)

    return pl.BlockSpec((None, number, keys), index)


def forward(
    q: jax.Array,  # [B, K, G, T, H], T a multiple of blocks.q
    k: jax.Array,  # [B, K, S, H], S a multiple of blocks.k
    v: jax.Array,  # [B, K, S, H]
    vectors: jax.Array,  # [B, 1 or 3, S] int32: until, hidden_from, hidden_until
    offsets: jax.Array,  # [B] int32: index of the first row
    tiles: jax.Array,  # [L] int32, runs over query blocks
    count: jax.Array,  # int32, how many entries of tiles there are
    *,
    scale: float,
    blocks: BlockSizes,
    vmem_bytes: int,
    interpret: pltpu.InterpretParams | None = None,
) -> tuple[jax.Array, jax.Array]:  # [B, K, G, T, H] in q.dtype, [B, K, T/rows, 1, G*rows] float32
    """Output and natural log-sum-exp; rows that see nothing get 0 and -inf."""
    B, K, G, T, H = q.shape
    S = k.shape[2]
    width = G * blocks.q
    code = TileCode(T // blocks.q, S // blocks.k)
    rows = row_spec(code, G, blocks.q, H, code.run)
    keys = key_spec(code, blocks.k, H, code.place)
    kernel = partial(_forward_kernel, code=code, scale=scale, blocks=blocks)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(K, count),
        in_specs=[rows, keys, keys, vector_spec(code, vectors.shape[1], blocks.k, code.place)],
        out_specs=[rows, statistic_spec(code, width, code.run)],
        scratch_shapes=[
            pltpu.VMEM((1, width), jnp.float32),
            pltpu.VMEM((1, width), jnp.float32),
            pltpu.VMEM((H, width), jnp.float32),
        ],
    )
    axes = jax.typeof(q).manual_axis_type
    return pl.pallas_call(
        kernel,
        grid_spec=spec,
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype, manual_axis_type=axes),
            jax.ShapeDtypeStruct(
                (B, K, code.num_runs, 1, width), jnp.float32, manual_axis_type=axes
            ),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        cost_estimate=cost(q, k, products=2, outputs=1),
        interpret=interpret if interpret is not None else False,
        name="masked_attention_forward",
    )(tiles, offsets, q, k, v, vectors)


def cost(q: jax.Array, k: jax.Array, *, products: int, outputs: int) -> pl.CostEstimate:
    """The causal half of all pairs: what is visible is not known when the program is compiled."""
    B, K, G, T, H = q.shape
    pairs = B * K * G * T * k.shape[2] // 2
    return pl.CostEstimate(
        flops=2 * products * pairs * H,
        transcendentals=pairs,
        bytes_accessed=(q.size * (1 + outputs) + 2 * k.size) * q.dtype.itemsize,
    )
