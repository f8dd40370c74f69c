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

    Row i sees key j iff `j <= i < until[j]`; indices are local to the layout.
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

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def num_edges(self) -> int:
        return len(self.edge_rows)

    @property
    def pairs(self) -> int:
        """Visible (row, key) pairs: what attention must compute."""
        return int((self.until.astype(np.int64) - np.arange(self.length)).clip(0).sum())


EDGE_FIELDS = ("edge_rows", "edge_targets", "edge_weights", "edge_turn_weights")
ROW_FIELDS = ("tokens", "positions", "until")
# A batch is a dict of these arrays: [B, S] for ROW_FIELDS and [B, E] for EDGE_FIELDS with E = S.
# Padding: token 0, position 0, until 0 (nobody sees it); edge_targets -1, edge_rows 0, weights 0.
