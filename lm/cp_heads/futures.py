# SPDX-License-Identifier: Apache-2.0
"""Futures: what a CP head learns from each row, read off the edges of packed rows.

A future is a row and a path of up to P trained edges that starts there. On a plain sequence every
trained row has one; where a prefix tree branches it has one per distinct path. A path ends at the
first edge that is not trained, so futures never leave their document, their turn or their branch.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import grain
import jax
import numpy as np

from lm.errors import UserError

FUTURE_FIELDS = ("future_rows", "future_targets", "future_children", "future_weights")
# future_rows [B, F] int32: the row whose hidden state predicts.
# future_targets [B, F, P] int32: the tokens of the path, -1 past its end.
# future_children [B, F, P] int32: the rows where those tokens lie, -1 past the end. The model's own
#   distribution of the token at step s is at the row itself (s = 0) or at future_children[s - 1].
# future_weights [B, F] float32: how many samples train this path and nothing beyond it; 0: padding.


class Edges(NamedTuple):
    """The trained edges of one packed row, in the order of their rows."""

    rows: np.ndarray  # [E]
    targets: np.ndarray  # [E]
    weights: np.ndarray  # [E]
    children: np.ndarray  # [E], -1 where the target lies in no row
    first: np.ndarray  # [S + 1]: edges of row r are first[r] : first[r + 1]


def with_futures(
    batch: Mapping[str, np.ndarray], predicted: int, capacity: int | None = None
) -> dict[str, np.ndarray]:
    """The batch [B, S] with FUTURE_FIELDS for `predicted` = P tokens.

    capacity: F, slots per row; None takes S. Chains need no more than S; a tree that branches often
      can.

    Raises:
      UserError: a row has more futures than slots.
    """
    capacity = capacity or batch["tokens"].shape[1]
    found = [
        futures_of_row({name: values[i] for name, values in batch.items()}, predicted)
        for i in range(len(batch["tokens"]))
    ]
    most = max(len(weights) for *_, weights in found)
    if most > capacity:
        raise UserError(f"a row of {most} futures exceeds {capacity} slots: raise data.seq_len")
    shape = (len(found), capacity)
    out = {
        "future_rows": np.zeros(shape, np.int32),
        "future_targets": np.full((*shape, predicted), -1, np.int32),
        "future_children": np.full((*shape, predicted), -1, np.int32),
        "future_weights": np.zeros(shape, np.float32),
    }
    for i, arrays in enumerate(found):
        for name, values in zip(FUTURE_FIELDS, arrays, strict=True):
            out[name][i, : len(values)] = values
    return {**batch, **out}


def abstract_futures(
    batch_size: int, capacity: int, predicted: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of FUTURE_FIELDS."""
    shape = (batch_size, capacity)
    paths = jax.ShapeDtypeStruct((*shape, predicted), np.int32)
    return {
        "future_rows": jax.ShapeDtypeStruct(shape, np.int32),
        "future_targets": paths,
        "future_children": paths,
        "future_weights": jax.ShapeDtypeStruct(shape, np.float32),
    }


@dataclasses.dataclass(frozen=True)
class WithFutures(grain.transforms.Map):
    """`with_futures` as a step of a data pipeline, after batching."""

    predicted: int

    def map(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return with_futures(batch, self.predicted)


def futures_of_row(
    row: Mapping[str, np.ndarray], predicted: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(rows [F], targets [F, P], children [F, P], weights [F]) of one packed row of [S] arrays.

    An edge says how many samples train it, not which. Samples that train an edge and the one before
    it are counted as the smaller of the two numbers: exact as long as no prompt ends in the middle
    of what another sample trains, and templates put untrained tokens before every completion.
    """
    edges = edges_of(row)
    rows, weights = edges.rows, edges.weights
    targets = np.full((len(rows), predicted), -1, np.int32)
    children = np.full((len(rows), predicted), -1, np.int32)
    targets[:, 0], children[:, 0] = edges.targets, edges.children
    ended = []
    for step in range(1, predicted):
        last = children[:, step - 1]
        start = edges.first[last]  # for -1: the end of the list, where nothing follows
        count = np.where(last < 0, 0, edges.first[last + 1] - start)
        path = np.repeat(np.arange(len(rows)), count)
        offset = np.arange(len(path)) - np.repeat(np.cumsum(count) - count, count)
        edge = np.repeat(start, count) + offset
        shared = np.minimum(weights[path], edges.weights[edge])
        # what no continuation accounts for are samples that end here
        left = weights - np.bincount(path, shared, len(rows)).astype(np.float32)
        over = left > 1e-3
        ended.append((rows[over], targets[over], children[over], left[over]))
        rows, targets, children, weights = rows[path], targets[path], children[path], shared
        targets[:, step], children[:, step] = edges.targets[edge], edges.children[edge]
    parts = zip(*ended, (rows, targets, children, weights), strict=True)
    rows, targets, children, weights = (np.concatenate(part) for part in parts)
    order = np.argsort(rows, kind="stable")
    return rows[order], targets[order], children[order], weights[order]


def edges_of(row: Mapping[str, np.ndarray]) -> Edges:
    """The edges with a positive weight, and where their targets lie."""
    trained = (row["edge_targets"] >= 0) & (row["edge_weights"] > 0)
    order = np.flatnonzero(trained)
    order = order[np.argsort(row["edge_rows"][order], kind="stable")]
    rows, targets = row["edge_rows"][order], row["edge_targets"][order]
    weights = row["edge_weights"][order].astype(np.float32)
    first = np.searchsorted(rows, np.arange(len(row["tokens"]) + 1))
    # the row below `parent` that holds `token`, found by both at once
    above, base = parents(row["until"]), int(max(row["tokens"].max(), targets.max(initial=0))) + 1
    below = np.flatnonzero(above >= 0)
    keys = above[below].astype(np.int64) * base + row["tokens"][below]
    by_key = np.argsort(keys, kind="stable")
    wanted = rows.astype(np.int64) * base + targets
    place = np.searchsorted(keys[by_key], wanted)
    place = np.minimum(place, max(len(below) - 1, 0))
    children = np.full(len(rows), -1, np.int32)
    if len(below):
        hit = keys[by_key[place]] == wanted
        children[hit] = below[by_key[place[hit]]]
    return Edges(rows, targets, weights, children, first)


def parents(until: np.ndarray) -> np.ndarray:
    """[S] int32: the nearest earlier row that each row sees, -1 for the first of a document and for
    padding."""
    size = len(until)
    rows = np.arange(size, dtype=np.int32)
    above = rows - 1
    # branches and documents begin where the row before is not seen: few, and searched for
    begins = np.flatnonzero(np.append(True, until[:-1] <= rows[1:])) if size else rows
    for row in begins.tolist():
        seen = np.flatnonzero(until[:row] > row)
        above[row] = seen[-1] if len(seen) else -1
    above[until == 0] = -1
    return above
