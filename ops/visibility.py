# SPDX-License-Identifier: Apache-2.0
"""The one mask type: at most three int32 vectors over the keys, never a dense [T, S] array on a
fast path.

Row i (array index, not position id) sees key j iff

    j <= i  and  i < until[j]  and  not (hidden_from[j] <= i < hidden_until[j])

so every key is visible to one run of rows that starts at the key itself, with at most one gap in
it. That covers packed documents, prefix trees, parallel blocks and sliding windows. Whether a
(query block, key block) pair is empty, partial or full follows from the smallest and largest entry
of each vector in the block: see `ops.block_table`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ops import block_table as block_tables

_PICTURE_SIZE = 64  # a mask with more rows or keys than this is drawn by blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which rows see which keys, as a pytree of int32 vectors.

    Rows downwards, keys to the right, `#` sees and `.` does not:

        until = 4 4 4 4      until = 2 2 4 4      until = 4 2 4 4      until       = 4 4 4 4
        (causal)             (two documents)      (a tree: 0-1, 0-2-3) hidden_from = 9 2 9 9
                                                                       hidden_until= 9 3 9 9
            #...                 #...                 #...                 #...
            ##..                 ##..                 ##..                 ##..
            ###.                 ..#.                 #.#.                 #.#.
            ####                 ..##                 #.##                 ####

    A key with `until[j] <= j` is seen by nobody (padding). `hidden_from` and `hidden_until` are
    given together or not at all; an entry with `hidden_from[j] >= hidden_until[j]` hides nothing.
    Row t of an array of T rows has index `row_offset[b] + t`; None means 0.
    """

    until: jax.Array  # [B, S] int32
    hidden_from: jax.Array | None = None  # [B, S] int32
    hidden_until: jax.Array | None = None  # [B, S] int32
    row_offset: jax.Array | None = None  # [B] int32

    @classmethod
    def causal(cls, batch: int, length: int) -> "Visibility":
        """Every row sees itself and everything before it; `length` keys.

        #...
        ##..
        ###.
        ####
        """
        return cls(jnp.full((batch, length), length, jnp.int32))

    @classmethod
    def documents(cls, lengths: Sequence[Sequence[int]] | jax.Array, length: int) -> "Visibility":
        """Documents laid end to end in rows of `length`; `lengths` is [B, documents], zeros
        allowed.

        The rest of a row is padding, seen by nobody. `documents([[2, 1]], 4)`:

            #...
            ##..
            ..#.
            ....

        Raises ValueError when the documents of a row do not fit into `length` (concrete `lengths`;
        under tracing such documents are cut off).
        """
        lengths = jnp.asarray(lengths, jnp.int32)
        if lengths.ndim != 2:
            raise ValueError(f"lengths must be [B, documents], got shape {lengths.shape}")
        if _concrete(lengths) and np.asarray(lengths).sum(1).max(initial=0) > length:
            raise ValueError(f"documents of {np.asarray(lengths).sum(1).max()} do not fit {length}")
        ends = jnp.cumsum(lengths, axis=1, dtype=jnp.int32)  # [B, documents]
        keys = jnp.arange(length, dtype=jnp.int32)

        def until(ends: jax.Array) -> jax.Array:  # [documents] -> [S]
            document = jnp.searchsorted(ends, keys, side="right")
            return jnp.append(ends, 0)[document]

        return cls(jnp.minimum(jax.vmap(until)(ends), length))

    @classmethod
    def sliding_window(cls, until: jax.Array, window: int) -> "Visibility":
        """Plain sequences with ends `until` [B, S], each row seeing at most the last `window` keys,
        itself included.

        `sliding_window([[4, 4, 4, 4]], 2)`:

            #...
            ##..
            .##.
            ..##

        Raises ValueError when window < 1, or when `until` describes a tree, where a window would be
        over depth and not over the array. A traced `until` cannot be inspected: it must describe
        plain sequences (non-decreasing, padding aside).
        """
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        until = jnp.asarray(until, jnp.int32)
        if _concrete(until):
            for row in np.asarray(until):
                visible = row[row > np.arange(len(row))]
                if (np.diff(visible) < 0).any():
                    raise ValueError("a sliding window is over plain sequences; `until` is a tree")
        keys = jnp.arange(until.shape[1], dtype=jnp.int32)
        return cls(jnp.minimum(until, keys[None, :] + window))

    @property
    def batch(self) -> int:
        return self.until.shape[0]

    @property
    def num_keys(self) -> int:
        return self.until.shape[1]

    def check(self) -> None:
        """Raises ValueError unless the fields fit together: shapes, int32, both hidden vectors or
        none."""
        if (self.hidden_from is None) != (self.hidden_until is None):
            raise ValueError("hidden_from and hidden_until are given together or not at all")
        expected = {
            "until": (self.until, (*self.until.shape[:1], *self.until.shape[1:2])),
            "hidden_from": (self.hidden_from, self.until.shape),
            "hidden_until": (self.hidden_until, self.until.shape),
            "row_offset": (self.row_offset, self.until.shape[:1]),
        }
        if self.until.ndim != 2:
            raise ValueError(f"until must be [B, S], got shape {self.until.shape}")
        for name, (array, shape) in expected.items():
            if array is None:
                continue
            if array.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
            if array.dtype != jnp.int32:
                raise ValueError(f"{name} must be int32, got {array.dtype}")

    def rows(self, num_rows: int) -> jax.Array:
        """[B, T] int32: the index of each row."""
        rows = jnp.arange(num_rows, dtype=jnp.int32)[None, :]
        if self.row_offset is None:
            return jnp.broadcast_to(rows, (self.batch, num_rows))
        return self.row_offset[:, None] + rows

    def as_array(self, num_rows: int) -> jax.Array:
        """[B, T, S] bool, the dense mask: for references, tests and pictures only."""
        self.check()
        keys = jnp.arange(self.num_keys, dtype=jnp.int32)
        return visible(self, self.rows(num_rows), keys)

    def block_table(self, num_rows: int, block_q: int, block_k: int) -> jax.Array:
        """[B, ceil(T / block_q), ceil(S / block_k)] int8: `EMPTY`, `PARTIAL` or `FULL` of
        `ops.block_table`.

        Conservative: a block with a visible pair is never empty, a block with an invisible pair is
        never full, and neither is a block that reaches beyond T or S. Computed inside jit from
        per-block extremes; no [T, S] array.
        """
        self.check()
        return block_tables.block_table(self, num_rows, block_q, block_k)

    def needed_blocks(self, num_rows: int, block_q: int, block_k: int) -> jax.Array:
        """[B] int32: how many blocks attention has to visit (those that the table does not call
        empty)."""
        table = self.block_table(num_rows, block_q, block_k)
        return jnp.sum(table != block_tables.EMPTY, axis=(1, 2), dtype=jnp.int32)

    def __and__(self, other: "Visibility") -> "Visibility":
        """Pairs visible in both: the smaller `until` and the union of the hidden runs.

        Runs are first cut to the rows where the key would be visible; a run that lasts to the end
        shortens `until` when it cannot be joined to the other. Raises ValueError when the two
        differ in shape or row_offset, and when a union is not one run. The last needs concrete
        arrays: under tracing such a key is hidden in the gap between its two runs as well, so too
        little is seen and never too much. Combine outside jit.
        """
        return _intersection(self, other)

    def picture(self, num_rows: int | None = None, row: int = 0) -> str:
        """Batch row `row` as text: `#` sees, `.` does not. T defaults to S.

        Above 64 rows or keys one character stands for a block: `#` full, `+` partial, `.` empty.
        Needs concrete arrays.
        """
        num_rows = self.num_keys if num_rows is None else num_rows
        one = jax.tree.map(lambda vector: vector[row : row + 1], self)
        if max(num_rows, self.num_keys) <= _PICTURE_SIZE:
            cells, letters = np.asarray(_as_array(one, num_rows))[0], ".#"
        else:
            block = -(-max(num_rows, self.num_keys) // _PICTURE_SIZE)
            cells = np.asarray(_block_table(one, num_rows, block, block))[0]
            letters = ".+#"
        return "\n".join("".join(letters[int(cell)] for cell in line) for line in cells)

    def __str__(self) -> str:
        if not all(_concrete(leaf) for leaf in jax.tree.leaves(self)):
            return f"Visibility(batch={self.batch}, num_keys={self.num_keys}, traced)"
        return "\n\n".join(self.picture(row=row) for row in range(self.batch))


def visible(visibility: Visibility, rows: jax.Array, keys: jax.Array) -> jax.Array:
    """[B, len(rows), len(keys)] bool for row indices [B, T'] and the matching key entries.

    `keys` [S'] are the indices of the keys that the vectors of `visibility` [B, S'] describe, so a
    block of keys is tested with a block of vectors.
    """
    rows = rows[:, :, None]
    seen = (keys[None, None, :] <= rows) & (rows < visibility.until[:, None, :])
    if visibility.hidden_from is not None:
        hidden = visibility.hidden_from[:, None, :] <= rows
        seen &= ~(hidden & (rows < visibility.hidden_until[:, None, :]))
    return seen


_as_array = jax.jit(Visibility.as_array, static_argnums=1)
_block_table = jax.jit(Visibility.block_table, static_argnums=(1, 2, 3))


def _concrete(array: jax.Array) -> bool:
    return not isinstance(array, jax.core.Tracer)


def _intersection(a: Visibility, b: Visibility) -> Visibility:
    a.check()
    b.check()
    if a.until.shape != b.until.shape:
        raise ValueError(f"cannot combine visibilities of {a.until.shape} and {b.until.shape}")
    row_offset = _common_offset(a, b)
    until = jnp.minimum(a.until, b.until)
    if a.hidden_from is None or b.hidden_from is None:
        run = a if b.hidden_from is None else b
        return Visibility(until, run.hidden_from, run.hidden_until, row_offset)

    keys = jnp.arange(a.num_keys, dtype=jnp.int32)[None, :]
    runs = []
    for side in (a, b):  # only rows in [j, until[j]) matter
        start = jnp.maximum(side.hidden_from, keys)
        runs.append((start, jnp.minimum(side.hidden_until, until)))
    (start_a, end_a), (start_b, end_b) = runs
    none_a, none_b = start_a >= end_a, start_b >= end_b
    start = jnp.where(none_a, start_b, jnp.where(none_b, start_a, jnp.minimum(start_a, start_b)))
    end = jnp.where(none_a, end_b, jnp.where(none_b, end_a, jnp.maximum(end_a, end_b)))

    apart = ~none_a & ~none_b & (jnp.maximum(start_a, start_b) > jnp.minimum(end_a, end_b))
    lasts = apart & (end >= until)
    if _concrete(apart) and np.asarray(apart & ~lasts).any():
        sequence, key = np.argwhere(np.asarray(apart & ~lasts))[0]
        raise ValueError(f"the hidden runs of key {key} of sequence {sequence} do not form one run")
    # Two runs, the later one lasting to the end: it becomes a smaller `until`, the earlier one
    # stays.
    end = jnp.where(lasts, jnp.minimum(end_a, end_b), end)
    until = jnp.where(lasts, jnp.maximum(start_a, start_b), until)
    return Visibility(until, start, end, row_offset)


def _common_offset(a: Visibility, b: Visibility) -> jax.Array | None:
    if a.row_offset is b.row_offset:
        return a.row_offset
    offsets = [
        jnp.zeros((v.batch,), jnp.int32) if v.row_offset is None else v.row_offset for v in (a, b)
    ]
    if not all(_concrete(offset) for offset in offsets):
        raise ValueError("cannot compare two traced row_offsets: set row_offset after combining")
    if (np.asarray(offsets[0]) != np.asarray(offsets[1])).any():
        raise ValueError("cannot combine visibilities with different row_offset")
    return offsets[0]
