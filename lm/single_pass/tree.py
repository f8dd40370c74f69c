# SPDX-License-Identifier: Apache-2.0
"""The prefix tree of a conversation's training samples, laid out depth first.

Samples that share a prefix share its rows. A row's position is its depth, `until` is the end of its
subtree, so a row sees exactly its ancestors: every path from the root is one N-pass sample with its
own positions and its own context. What to predict is an edge (parent row -> child token), trained
by as many samples as pass through it with that token in their completion.

Built as a radix tree, whose nodes are runs of tokens: the work is a few array operations per
sample, never one per token.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lm.data.layout import Layout


class TrainingSample(Protocol):
    """What a tree needs of a sample: `tokens[prompt_length:]` are trained."""

    tokens: np.ndarray  # [n] int32
    prompt_length: int
    turn: int


def check_sample(sample: TrainingSample) -> None:
    """Raises ValueError: a sample's first token has no row that could predict it."""
    if not 1 <= sample.prompt_length <= len(sample.tokens):
        raise ValueError(
            f"prompt_length {sample.prompt_length} of a sample of {len(sample.tokens)} tokens: the"
            " prompt must have at least one token, which predicts the first trained one"
        )


class PrefixTree:
    """A radix tree that grows by one sample at a time. Node 0 is an empty root.

    Invariant: children are in the order in which a sample last passed through them. A new sample
    can only disturb that below the point where it leaves the sample before it, since everything
    above already came last.
    """

    def __init__(self) -> None:
        self.samples: list[TrainingSample] = []
        self.size = 0  # tokens in the tree
        # Node i is tokens[low[i]:high[i]] of sample source[i]; low is also its depth.
        self._source = [0]
        self._low = [0]
        self._high = [0]
        self._parent = [-1]
        self._children: list[dict[int, int]] = [{}]
        self._end: list[int] = []  # per sample, the node that ends where the sample does
        self._path = [0]  # the nodes of the latest sample, and where each ends
        self._path_high = [0]

    def insert(self, sample: TrainingSample) -> None:
        """Adds a sample. Raises ValueError when its prompt is empty."""
        check_sample(sample)
        tokens = sample.tokens
        shared = _common(self.samples[-1].tokens, tokens) if self.samples else 0
        level = bisect_left(self._path_high, shared)
        del self._path[level + 1 :], self._path_high[level + 1 :]
        node = self._path[level]
        if self._high[node] > shared:
            node = self._split(node, shared)
            self._path[level], self._path_high[level] = node, shared
        else:
            node = self._walk(node, tokens)
        depth = self._high[node]
        self.samples.append(sample)
        if depth < len(tokens):
            leaf = self._add(len(self.samples) - 1, depth, len(tokens), node)
            self._children[node][int(tokens[depth])] = leaf
            self._step(leaf)
            self.size += len(tokens) - depth
            node = leaf
        self._end.append(node)

    def matched(self, sample: TrainingSample) -> int:
        """How many leading tokens of `sample` the tree already has."""
        node, tokens = 0, sample.tokens
        while True:
            depth = self._high[node]
            child = self._children[node].get(int(tokens[depth])) if depth < len(tokens) else None
            if child is None:
                return depth
            shared = self._along(child, tokens)
            if shared < self._high[child]:
                return shared
            node = child

    def _walk(self, node: int, tokens: np.ndarray) -> int:
        """Follows `tokens` down from a node's end; returns the node that ends where they part."""
        while True:
            depth = self._high[node]
            children = self._children[node]
            first = int(tokens[depth]) if depth < len(tokens) else -1
            child = children.pop(first, None)
            if child is None:
                return node
            children[first] = child  # back in as the last
            shared = self._along(child, tokens)
            if shared < self._high[child]:
                child = self._split(child, shared)
                self._step(child)
                return child
            self._step(child)
            node = child

    def _along(self, node: int, tokens: np.ndarray) -> int:
        """The depth at which `tokens`, which agree until the node, leave it (or its end)."""
        low, high = self._low[node], self._high[node]
        return low + _common(self.samples[self._source[node]].tokens[low:high], tokens[low:high])

    def _split(self, node: int, depth: int) -> int:
        """Cuts a node in two at `depth`; the node keeps the lower part, the upper is returned."""
        source, low, parent = self._source[node], self._low[node], self._parent[node]
        tokens = self.samples[source].tokens
        upper = self._add(source, low, depth, parent)
        self._children[parent][int(tokens[low])] = upper  # keeps the node's place in the order
        self._children[upper][int(tokens[depth])] = node
        self._low[node], self._parent[node] = depth, upper
        return upper

    def _add(self, source: int, low: int, high: int, parent: int) -> int:
        self._source.append(source)
        self._low.append(low)
        self._high.append(high)
        self._parent.append(parent)
        self._children.append({})
        return len(self._source) - 1

    def _step(self, node: int) -> None:
        self._path.append(node)
        self._path_high.append(self._high[node])

    def leaf_of(self, index: int) -> int:
        """A node without children that the sample is on the way to; its own if nothing goes on."""
        node = self._end[index]
        while self._children[node]:
            node = next(iter(self._children[node].values()))
        return node

    def layout(self) -> Layout:
        """Lays the tree out depth first, the branch of the latest sample first.

        What later turns go on from is then one run of rows, and the thoughts that they drop follow
        in reverse: a block of rows sees one prefix of that run instead of many pieces, so nearly
        all of its blocks of keys are fully visible.
        """
        order, starts, sizes = self._preorder()
        low = [self._low[node] for node in order]
        lengths = [self._high[node] - self._low[node] for node in order]
        first = np.array([starts[node] for node in order], np.int32)
        lengths_array = np.array(lengths, np.int32)
        ends = np.array([starts[node] + sizes[node] for node in order], np.int32)
        shift = first - np.array(low, np.int32)
        tokens = np.concatenate(
            [self.samples[self._source[n]].tokens[self._low[n] : self._high[n]] for n in order]
        )
        rows = np.arange(self.size, dtype=np.int32)
        above = rows - 1
        above[first] = [
            starts[p] + self._high[p] - self._low[p] - 1 if (p := self._parent[node]) else -1
            for node in order
        ]
        paths = self._paths(order, starts, rows)
        return edges_to_layout(
            tokens=tokens.astype(np.int32, copy=False),
            positions=rows - np.repeat(shift, lengths_array),
            until=np.repeat(ends, lengths_array),
            above=above,
            paths=paths,
            samples=self.samples,
        )

    def _preorder(self) -> tuple[list[int], list[int], list[int]]:
        """Nodes in layout order without the root; per node its first row and its subtree's size."""
        count = len(self._source)
        starts, sizes = [0] * count, [0] * count
        order: list[int] = []
        pending = list(self._children[0].values())
        row = 0
        while pending:
            node = pending.pop()
            order.append(node)
            starts[node] = row
            sizes[node] = self._high[node] - self._low[node]
            row += sizes[node]
            children = self._children[node]
            if children:
                pending.extend(children.values())
        for node in reversed(order):
            sizes[self._parent[node]] += sizes[node]
        return order, starts, sizes

    def _paths(
        self, order: Sequence[int], starts: Sequence[int], rows: np.ndarray
    ) -> list[np.ndarray]:
        """The rows of each sample's tokens."""
        ending: dict[int, list[int]] = {}
        for index, node in enumerate(self._end):
            ending.setdefault(node, []).append(index)
        paths: list[np.ndarray] = [rows] * len(self.samples)
        # In depth-first order the current path is one buffer that only its tail changes.
        current = np.empty(max(self._high), np.int32)
        for node in order:
            low, high, start = self._low[node], self._high[node], starts[node]
            current[low:high] = rows[start : start + high - low]
            for index in ending.get(node, ()):
                paths[index] = current[:high].copy()
        return paths


def edges_to_layout(
    tokens: np.ndarray,
    positions: np.ndarray,
    until: np.ndarray,
    above: np.ndarray,
    paths: Sequence[np.ndarray],
    samples: Sequence[TrainingSample],
) -> Layout:
    """A layout in which every token has one row above it that may predict it.

    Args:
      tokens, positions, until: [T] int32, as in `Layout`.
      above: [T] int32, the row that predicts each row's token, -1 where none can.
      paths: per sample [n] int32, the rows of its tokens.
      samples: what is trained: `tokens[prompt_length:]` of each.
    """
    size = len(tokens)
    weights = np.zeros(size, np.float32)
    turn_weights = np.zeros(size, np.float32)
    turns = np.zeros(size, np.int32)
    for path, sample in zip(reversed(paths), reversed(samples), strict=True):
        prompt = sample.prompt_length
        count = len(path) - prompt
        if not count:
            continue
        first, last = int(path[prompt]), int(path[-1])
        # Rows of a path ascend; they are one run unless branches lie between.
        trained = slice(first, last + 1) if last - first + 1 == count else path[prompt:]
        weights[trained] += 1
        turn_weights[trained] += 1 / count
        turns[trained] = sample.turn  # reversed, so the first sample has the last word
    children = weights.nonzero()[0]
    return Layout(
        tokens=tokens,
        positions=positions,
        until=until,
        edge_rows=above[children],
        edge_targets=tokens[children],
        edge_weights=weights[children],
        edge_turn_weights=turn_weights[children],
        edge_children=children.astype(np.int32),
        edge_turns=turns[children],
        paths=tuple(paths),
    )


def chain(sample: TrainingSample) -> Layout:
    """One sample by itself: a tree without branches. Raises ValueError on an empty prompt."""
    check_sample(sample)
    size, prompt = len(sample.tokens), sample.prompt_length
    rows = np.arange(size, dtype=np.int32)
    count = size - prompt
    tokens = np.asarray(sample.tokens, np.int32)
    return Layout(
        tokens=tokens,
        positions=rows,
        until=np.full(size, size, np.int32),
        edge_rows=rows[prompt - 1 : size - 1],
        edge_targets=tokens[prompt:],
        edge_weights=np.ones(count, np.float32),
        edge_turn_weights=np.full(count, 1 / max(count, 1), np.float32),
        edge_children=rows[prompt:],
        edge_turns=np.full(count, sample.turn, np.int32),
        paths=(rows,),
    )


def build_tree(samples: Sequence[TrainingSample]) -> Layout:
    """Merges samples token by token and lays the tree out depth first.

    Samples may be equal, prefixes of each other, or share nothing (then it is a forest, whose
    parts cannot see each other).

    Returns:
      A `Layout` whose edges are ordered by child row and whose `paths` are in the given order.

    Raises:
      ValueError: no samples, or one with an empty prompt.
    """
    if not samples:
        raise ValueError("a tree needs at least one sample")
    if len(samples) == 1:
        return chain(samples[0])
    tree = PrefixTree()
    for sample in samples:
        tree.insert(sample)
    return tree.layout()


def prefix_groups(samples: Sequence[TrainingSample]) -> list[list[int]]:
    """Indices of samples that lie on one path: each group's longest sample begins with the others.

    A sample that several others extend goes with one of them. Groups are in the order of their
    first sample.
    """
    tree = PrefixTree()
    for sample in samples:
        tree.insert(sample)
    groups: dict[int, list[int]] = {}
    for index in range(len(samples)):
        groups.setdefault(tree.leaf_of(index), []).append(index)
    return list(groups.values())


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix."""
    size = min(len(a), len(b))
    different = a[:size] != b[:size]
    at = int(different.argmax()) if size else 0
    return at if size and different[at] else size
