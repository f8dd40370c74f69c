# SPDX-License-Identifier: Apache-2.0
"""What a training row is made of: tokens with explicit positions and visibility, and edges to
train.

Labels are data. An edge says "row r predicts token t with weight w"; the loss never shifts
anything, so a layout is free to say what follows what. A row can carry several edges (a prefix tree
that branches there).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """One self-contained piece of training data: a tree, a chain, or any layout with explicit
    edges.

    Row i sees key j iff `j <= i < until[j]` and not `hidden_from[j] <= i < hidden_until[j]`;
    indices are local to the layout. Layouts that hide nothing in between leave the last two out.
    """

    tokens: np.ndarray  # [T] int32
    positions: np.ndarray  # [T] int32
    until: np.ndarray  # [T] int32, 0 <= until <= T
    edge_rows: np.ndarray  # [E] int32, the row that predicts
    edge_targets: np.ndarray  # [E] int32, the token that it predicts
    edge_weights: np.ndarray  # [E] float32, how many samples train this edge
    edge_turn_weights: (
        np.ndarray
    )  # [E] float32, sum over those samples of 1 / (trained tokens of the sample)
    edge_children: np.ndarray  # [E] int32, the row where the target token itself lies
    edge_turns: np.ndarray  # [E] int32, the first turn (0-based assistant message) that trains it
    paths: tuple[np.ndarray, ...] = ()  # one [n] int32 per sample: the rows of its tokens, in order
    hidden_from: np.ndarray | None = None  # [T] int32, given together with hidden_until
    hidden_until: np.ndarray | None = None  # [T] int32; hides nothing where it is <= hidden_from

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def num_edges(self) -> int:
        return len(self.edge_rows)

    @property
    def pairs(self) -> int:
        """Visible (row, key) pairs: what attention must compute."""
        rows = np.arange(self.length)
        seen = (self.until.astype(np.int64) - rows).clip(0).sum()
        if self.hidden_from is None:
            return int(seen)
        start = np.maximum(self.hidden_from, rows).astype(np.int64)
        return int(seen - (np.minimum(self.hidden_until, self.until) - start).clip(0).sum())


EDGE_FIELDS = ("edge_rows", "edge_targets", "edge_weights", "edge_turn_weights")
ROW_FIELDS = ("tokens", "positions", "until")
HIDDEN_FIELDS = ("hidden_from", "hidden_until")
# A batch is a dict of these arrays: [B, S] for ROW_FIELDS and [B, E] for EDGE_FIELDS with E = S;
# [B, S] for HIDDEN_FIELDS, too, when its layouts have them.
# Padding: token 0, position 0, until 0 (nobody sees it); edge_targets -1, edge_rows 0, weights 0.
