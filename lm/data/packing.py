# SPDX-License-Identifier: Apache-2.0
"""Whole layouts packed into rows of a fixed length, as a resumable grain dataset.

A layout is never cut here: what does not fit a row is the caller's to split. Packing is first-fit
decreasing over a window of layouts, and everything that it puts out is a function of the parent's
elements alone, so a position in the data is the parent's state at the start of the window and the
index of the next row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from lm.data.layout import EDGE_FIELDS, HIDDEN_FIELDS, ROW_FIELDS, Layout
from lm.errors import UserError

Row = dict[str, np.ndarray]

_DTYPES = {
    "tokens": np.int32,
    "positions": np.int32,
    "until": np.int32,
    "edge_rows": np.int32,
    "edge_targets": np.int32,
    "edge_weights": np.float32,
    "edge_turn_weights": np.float32,
}
_HIDDEN_DTYPES = dict.fromkeys(HIDDEN_FIELDS, np.int32)
_FRUITLESS = 20_000  # conversations without a layout that are read before giving up


@dataclasses.dataclass(frozen=True)
class Group:
    """What one conversation gives to packing: its layouts, and counts of what became of it."""

    layouts: Sequence[Layout]
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


def assign(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: which items share a bin of `capacity`.

    Items of a bin are in their given order and bins are in the order of their first item, so that
    the order of the data survives packing as far as it can.

    Raises:
      ValueError: an item is larger than the capacity.
    """
    sizes = np.asarray(sizes, np.int64)
    if not len(sizes):
        return []
    if sizes.max() > capacity:
        raise ValueError(f"an item of size {sizes.max()} does not fit a bin of {capacity}")
    free = np.full(len(sizes), capacity, np.int64)
    bins: list[list[int]] = []
    # First-fit decreasing leaves every bin before `first` too full for the smallest item left.
    smallest, first = int(sizes.min()), 0
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = sizes[item]
        place = first + int((free[first : len(bins) + 1] >= size).argmax())
        if place == len(bins):
            bins.append([])
        bins[place].append(item)
        free[place] -= size
        while first < len(bins) and free[first] < smallest:
            first += 1
    for items in bins:
        items.sort()
    bins.sort(key=lambda items: items[0])
    return bins


def pack(layouts: Sequence[Layout], seq_len: int) -> list[Row]:
    """Packs whole layouts into rows.

    Args:
      layouts: pieces of at most `seq_len` tokens and at most `seq_len` edges each.
      seq_len: S, the length of a row, and the number of its edge slots.

    Returns:
      Rows, each a dict of [S] arrays: the fields of `lm.data.layout` with `until` and `edge_rows`
      counted from the start of the row. `until` never passes the end of its own layout, whatever
      the layout says, so neighbours in a row cannot see each other. Padding as documented there.
      Rows have hidden runs when the layouts do.

    Raises:
      ValueError: a layout does not fit a row, or only some of the layouts have hidden runs.
    """
    hidden = {layout.hidden_from is not None for layout in layouts}
    if len(hidden) > 1:
        raise ValueError("layouts with hidden runs and layouts without them cannot share rows")
    sizes = [max(len(layout.tokens), len(layout.edge_rows)) for layout in layouts]
    return [
        _row([layouts[index] for index in members], seq_len) for members in assign(sizes, seq_len)
    ]


def _row(members: Sequence[Layout], seq_len: int) -> Row:
    hidden = HIDDEN_FIELDS if members[0].hidden_from is not None else ()
    row = empty_row(seq_len, bool(hidden))
    lengths = np.array([len(layout.tokens) for layout in members])
    edges = np.array([len(layout.edge_rows) for layout in members])
    num_tokens, num_edges = int(lengths.sum()), int(edges.sum())
    for fields, end in (((*ROW_FIELDS, *hidden), num_tokens), (EDGE_FIELDS, num_edges)):
        for name in fields:
            parts = [getattr(layout, name) for layout in members]
            np.concatenate(parts, out=row[name][:end], casting="same_kind")
    ends = np.cumsum(lengths, dtype=np.int32)
    starts = ends - lengths.astype(np.int32)
    for name in hidden:
        row[name][:num_tokens] += np.repeat(starts, lengths)
    until = row["until"][:num_tokens]
    until += np.repeat(starts, lengths)
    np.minimum(until, np.repeat(ends, lengths), out=until)
    row["edge_rows"][:num_edges] += np.repeat(starts, edges)
    return row


def stack(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Rows of [S] to a batch of [B, S]; ValueError when only some have hidden runs."""
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError("rows with hidden runs and rows without them cannot share a batch")
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def empty_row(seq_len: int, hidden: bool = False) -> Row:
    """A row of padding only, for a process whose data ran out before the others'.

    hidden: with hidden runs, like the rows beside it.
    """
    dtypes = _DTYPES | (_HIDDEN_DTYPES if hidden else {})
    row = {name: np.zeros(seq_len, dtype) for name, dtype in dtypes.items()}
    row["edge_targets"].fill(-1)
    return row


def batches(dataset: grain.IterDataset, batch_size: int, seq_len: int) -> grain.IterDataset:
    """Rows to [B, S] batches; a last one that is not full is completed with rows of padding."""

    def stacked(group: Sequence[Row]) -> dict[str, np.ndarray]:
        padding = empty_row(seq_len, HIDDEN_FIELDS[0] in group[0])
        return stack([*group, *[padding] * (batch_size - len(group))])

    return dataset.batch(batch_size, drop_remainder=False, batch_fn=stacked)


class PackedRows(grain.IterDataset):
    """Packs the layouts of a parent dataset into rows, a window at a time.

    The parent yields one `Group` per conversation. A window is whole groups, taken until it holds
    at least `window` layouts or the data ends; its rows come out in a fixed order before the next
    window is read. The parent can be sharded by process before it comes here
    (`source[process_index::process_count]`), and `.batch(n, drop_remainder=...)` can follow.
    """

    def __init__(self, parent: grain.IterDataset | grain.MapDataset, seq_len: int, window: int):
        """`seq_len`: S, the tokens of a row. `window`: layouts packed together, at least 1."""
        if seq_len < 1 or window < 1:
            raise ValueError(f"seq_len and window must be positive, got {seq_len} and {window}")
        if isinstance(parent, grain.MapDataset):
            parent = parent.to_iter_dataset()
        super().__init__(parent)
        self._seq_len = seq_len
        self._window = window

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(self._parent.__iter__(), self._seq_len, self._window)

    def __str__(self) -> str:
        return f"PackedRows(seq_len={self._seq_len}, window={self._window})"


class _PackedIterator(grain.DatasetIterator):
    """State: the parent's state where the window starts, the next row, the totals until there.

    A restored iterator reads the window again, which makes the same rows.
    """

    def __init__(self, parent: grain.DatasetIterator, seq_len: int, window: int):
        super().__init__(parent)
        self._seq_len = seq_len
        self._window = window
        self._rows: list[Row] | None = None  # None: the parent stands at the start of the window
        self._window_state: dict[str, Any] = {}
        self._next_row = 0
        self._totals_before: dict[str, int] = {}
        self._totals: dict[str, int] = {}

    def _read_window(self) -> bool:
        """Reads groups and packs them; False when the parent has nothing more."""
        self._window_state = self._parent.get_state()
        layouts: list[Layout] = []
        counts: dict[str, int] = {}
        groups = 0
        while len(layouts) < self._window:
            if groups >= _FRUITLESS and not layouts:  # an endless parent would go on for ever
                dropped = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
                raise UserError(
                    f"{groups} conversations in a row give nothing to train on at "
                    f"data.seq_len={self._seq_len} ({dropped})"
                )
            try:
                group = next(self._parent)
            except StopIteration:
                break
            groups += 1
            layouts.extend(group.layouts)
            _add(counts, group.counts)
        if not groups:
            return False
        self._rows = pack(layouts, self._seq_len)
        _add(counts, {"groups": groups, **fill(layouts, len(self._rows), self._seq_len)})
        self._totals = dict(self._totals_before)
        _add(self._totals, counts)
        return True

    def __next__(self) -> Row:
        self._assert_not_closed()
        while True:
            if self._rows is None and not self._read_window():
                raise StopIteration
            if self._next_row < len(self._rows):
                self._next_row += 1
                return self._rows[self._next_row - 1]
            self._rows, self._next_row, self._totals_before = None, 0, self._totals

    def get_state(self) -> dict[str, Any]:
        return {
            "parent": self._parent.get_state() if self._rows is None else self._window_state,
            "next_row": self._next_row,
            "totals": dict(self._totals_before),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._rows = None
        self._next_row = int(state["next_row"])
        self._totals_before = dict(state["totals"])
        self._totals = dict(state["totals"])

    def __str__(self) -> str:
        return f"PackedIterator(seq_len={self._seq_len}, window={self._window})"


def _add(totals: dict[str, int], counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        totals[name] = totals.get(name, 0) + int(count)


def fill(layouts: Sequence[Layout], num_rows: int, seq_len: int) -> dict[str, int]:
    """How well `layouts` filled `num_rows` rows: the fill is `tokens / row_tokens`."""
    return {
        "layouts": len(layouts),
        "tokens": sum(layout.length for layout in layouts),
        "edges": sum(layout.num_edges for layout in layouts),
        "rows": num_rows,
        "row_tokens": num_rows * seq_len,
    }


def statistics(iterator: grain.DatasetIterator) -> dict[str, int | float]:
    """Totals over the windows read so far by the `PackedRows` inside an iterator.

    `fill` is the fraction of row positions that hold a token; the other entries are the counts of
    `fill()` and those of the groups. They are part of the iterator's state. Under grain's
    prefetching the iterator may have read one window more than it has handed out.

    Raises:
      ValueError: no `PackedRows` in this pipeline.
    """
    found: list[grain.DatasetIterator] = [iterator]
    while found:
        current = found.pop()
        if isinstance(current, _PackedIterator):
            totals: dict[str, int | float] = dict(current._totals)
            totals["fill"] = totals.get("tokens", 0) / max(totals.get("row_tokens", 0), 1)
            return totals
        found.extend(current._parents)
    raise ValueError("this iterator does not read from PackedRows")
