# SPDX-License-Identifier: Apache-2.0
"""Which (query block, key block) pairs attention has to visit, and the compacted lists that kernels
walk.

A first-to-last range per query block would not do: the first block is nearly always needed, while
most blocks between it and the diagonal can be empty.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from ops.visibility import Visibility

EMPTY, PARTIAL, FULL = 0, 1, 2
_BIG = 2**31 - 1


class BlockList(NamedTuple):
    """For each of `n` blocks, the blocks of the other side that it meets, in ascending order.

    Entries from `counts` on repeat the last needed block (so that a prefetch finds it in place)
    with kind `EMPTY`.
    """

    counts: jax.Array  # [..., n] int32
    indices: jax.Array  # [..., n, m] int32
    kinds: jax.Array  # [..., n, m] int8


def block_table(
    visibility: "Visibility", num_rows: int, block_q: int, block_k: int
) -> jax.Array:  # [B, nq, nk] int8
    """See `Visibility.block_table`."""
    first_row, last_row, whole_rows = _row_bounds(visibility, num_rows, block_q)
    keys = jnp.arange(visibility.num_keys, dtype=jnp.int32)[None, :]
    until = visibility.until
    if visibility.hidden_from is None:
        has_run = jnp.zeros_like(until, bool)
        start = end = until
    else:
        start = jnp.maximum(visibility.hidden_from, keys)
        end = visibility.hidden_until
        # A run that lasts to the end is the same as a smaller `until`, which the extremes describe
        # better.
        until = jnp.where((start < end) & (end >= until), jnp.minimum(until, start), until)
        has_run = (start < end) & (start < until)
    dead = until <= keys

    def low(values: jax.Array) -> jax.Array:
        return _block_extreme(values, block_k, jnp.min, _BIG)[:, None, :]

    def high(values: jax.Array) -> jax.Array:
        return _block_extreme(values, block_k, jnp.max, -_BIG)[:, None, :]

    first_row, last_row = first_row[:, :, None], last_row[:, :, None]
    first_key = (jnp.arange(-(-keys.shape[1] // block_k), dtype=jnp.int32) * block_k)[None, None]
    last_key = jnp.minimum(first_key + block_k, keys.shape[1]) - 1

    # Every key's run covers all rows of the block; dead keys do not count, keys without a run
    # refute it.
    hidden = (high(jnp.where(dead, -_BIG, jnp.where(has_run, start, _BIG))) <= first_row) & (
        low(jnp.where(dead, _BIG, jnp.where(has_run, end, -_BIG))) > last_row
    )
    empty = (first_key > last_row) | (high(until) <= first_row) | hidden
    # No key's run meets a row of the block.
    clear = (low(jnp.where(has_run, start, _BIG)) > last_row) | (
        high(jnp.where(has_run, end, -_BIG)) <= first_row
    )
    full = (last_key <= first_row) & (low(until) > last_row) & clear
    num_k = first_key.shape[-1]
    whole_keys = (jnp.arange(1, num_k + 1) * block_k <= visibility.num_keys)[None, None, :]
    full &= whole_rows[None, :, None] & whole_keys
    return jnp.where(empty, EMPTY, jnp.where(full, FULL, PARTIAL)).astype(jnp.int8)


def _row_bounds(
    visibility: "Visibility", num_rows: int, block_q: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First and last row index of each query block ([B, nq] each), and whether it has all its rows
    ([nq])."""
    num_q = -(-num_rows // block_q)
    first = jnp.arange(num_q, dtype=jnp.int32) * block_q
    last = jnp.minimum(first + block_q, num_rows) - 1
    offset = visibility.row_offset
    offset = jnp.zeros((visibility.batch,), jnp.int32) if offset is None else offset
    offset = offset[:, None]
    return offset + first[None, :], offset + last[None, :], first + block_q <= num_rows


def _block_extreme(values: jax.Array, block: int, reduce, neutral: int) -> jax.Array:
    """Extreme of each block of the last axis; the missing tail of the last block is neutral."""
    batch, length = values.shape
    padded = jnp.pad(values, ((0, 0), (0, -length % block)), constant_values=neutral)
    return reduce(padded.reshape(batch, -1, block), axis=-1)


def merge_batch(table: jax.Array) -> jax.Array:
    """[B, nq, nk] -> [nq, nk]: empty where all are empty, full where all are full."""
    empty, full = jnp.all(table == EMPTY, axis=0), jnp.all(table == FULL, axis=0)
    return jnp.where(empty, EMPTY, jnp.where(full, FULL, PARTIAL)).astype(jnp.int8)


def key_blocks(table: jax.Array) -> BlockList:
    """[..., nq, nk] -> for each query block the key blocks that it sees (forward and dq)."""
    needed = table != EMPTY
    counts = jnp.sum(needed, axis=-1, dtype=jnp.int32)
    order = jnp.argsort(~needed, axis=-1, stable=True).astype(jnp.int32)
    place = jnp.arange(table.shape[-1], dtype=jnp.int32)
    place = jnp.broadcast_to(place, table.shape)
    last = jnp.maximum(counts - 1, 0)[..., None]
    indices = jnp.take_along_axis(order, jnp.minimum(place, last), axis=-1)
    kinds = jnp.take_along_axis(table, indices, axis=-1)
    return BlockList(counts, indices, jnp.where(place < counts[..., None], kinds, EMPTY))


def query_blocks(table: jax.Array) -> BlockList:
    """[..., nq, nk] -> for each key block the query blocks that see it (dk and dv)."""
    return key_blocks(jnp.swapaxes(table, -1, -2))
