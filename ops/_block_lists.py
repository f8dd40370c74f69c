# SPDX-License-Identifier: Apache-2.0
"""Lists of the blocks that a tile needs, fully visible ones first, for kernels that mask only in
the rest."""

import jax
import jax.numpy as jnp

from ops import block_table as block_tables
from ops import dispatch
from ops._varying import varying_like
from pallas_kernels import triton_call

_SHIFT = 28
_FULL, _OTHER, _UNNEEDED = 0, 1, 2  # ranks


def full_first(table: jax.Array, spare: int = 0) -> tuple[jax.Array, jax.Array]:
    """[B, n, m] kinds -> how many blocks are full and how many are needed [B, n, 2] int32, and the
    needed blocks [B, n, m + spare] int32: full ones, then partial ones, both in ascending order,
    then `spare` (at most 15) places that name block m; what follows is undefined."""
    rank = block_tables.FULL - table.astype(jnp.int32)
    return _lists(rank, jax.lax.broadcasted_iota(jnp.int32, table.shape, 2), spare)


def full_first_halves(table: jax.Array, halves: int, bits: int) -> tuple[jax.Array, jax.Array]:
    """[B, n, halves * m] kinds -> for each of n blocks the needed groups of `halves` blocks, as
    `full_first`: full where all are full. An entry is the group's index and, in its low bits, the
    kind of each half in `bits` bits."""
    kinds = table.reshape(*table.shape[:2], -1, halves).astype(jnp.int32)
    full = jnp.all(kinds == block_tables.FULL, axis=-1)
    needed = jnp.any(kinds != block_tables.EMPTY, axis=-1)
    rank = jnp.where(full, _FULL, jnp.where(needed, _OTHER, _UNNEEDED))
    entry = jax.lax.broadcasted_iota(jnp.int32, rank.shape, 2) << (halves * bits)
    for half in range(halves):
        entry |= kinds[..., half] << (half * bits)
    return _lists(rank, entry, 0)


def _lists(rank: jax.Array, entry: jax.Array, spare: int) -> tuple[jax.Array, jax.Array]:
    """Entries are below 2 ** 28 and ascend along the last axis."""
    ranked, blank = (rank << _SHIFT) | entry, rank.shape[-1]
    if dispatch.current_platform() == "gpu":
        try:
            triton_call.require()
            from pallas_kernels import block_lists_triton

            lists = block_lists_triton.lists(ranked, blank, spare, triton_call.capability())
            return varying_like(tuple(lists), rank)
        except triton_call.Missing:
            pass  # ten launches instead of one
    full = jnp.sum(rank == _FULL, axis=-1, dtype=jnp.int32)
    needed = jnp.sum(rank != _UNNEEDED, axis=-1, dtype=jnp.int32)
    entries = jnp.sort(ranked, axis=-1) & ((1 << _SHIFT) - 1)
    place = jax.lax.broadcasted_iota(jnp.int32, rank.shape, 2)
    entries = jnp.where(place < needed[..., None], entries, blank)
    entries = jnp.pad(entries, ((0, 0), (0, 0), (0, spare)), constant_values=blank)
    return jnp.stack((full, needed), axis=-1), entries
