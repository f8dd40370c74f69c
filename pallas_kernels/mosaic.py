# SPDX-License-Identifier: Apache-2.0
"""What the Mosaic GPU kernels share: tiles, layouts, and the names that differ between versions of
JAX."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

UNIT = 64  # rows of one wgmma, and of the blocks that masks are cut into
COMPUTE = 2  # compute warpgroups; one more fetches
ACROSS = plgpu.Layout.WGMMA.reduce(1)  # a value per row of an accumulator
DOWN = plgpu.Layout.WGMMA.reduce(0)  # a value per column of an accumulator
_OLD = jax.__version_info__ < (0, 11)


def shared(shape: tuple[int, ...], dtype) -> plgpu.SMEM:
    """Shared memory that TMA writes and wgmma reads."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def transposed(ref):
    return plgpu.transpose_ref(ref, (1, 0)) if _OLD else ref.transpose((1, 0))


def load(ref, layout) -> jax.Array:
    index = ((),) if _OLD else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def accumulator(shape: tuple[int, int]) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def column(rows: int, value: float) -> jax.Array:
    """One value per row of an accumulator."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), ACROSS)


def across(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [0])


def down(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [1])


def positions(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def unsigned(x: jax.Array) -> jax.Array:
    """For bound >= 0, unsigned(x) < unsigned(bound) says 0 <= x < bound in one comparison."""
    return lax.bitcast_convert_type(x, jnp.uint32)


def multiply(a, b, shape: tuple[int, int]) -> jax.Array:
    """a b, for b in shared memory; waits for the result."""

    def product(ref):
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def multiply_add(acc: jax.Array, a, b) -> jax.Array:
    """acc + a b, for b in shared memory; waits for the result."""
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))


def heads_per_tile(group: int) -> int:
    """How many of the `group` query heads of one key head a tile of queries holds.

    With two, both compute warpgroups take the same 64 rows, so masks are cut at 64 rows; with one
    they take 128 rows of one head.
    """
    return 2 if group % 2 == 0 else 1


def tile_rows(group: int) -> int:
    """Rows of a tile of queries."""
    return COMPUTE * UNIT // heads_per_tile(group)
