# SPDX-License-Identifier: Apache-2.0
"""One conversation as a table of tokens, and what its rows see as a picture."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from lm.data.layout import Layout
from lm.single_pass.samples import Sample, response_start, token_spans
from lm.text.tokenizers import Tokenizer

TEXT_LIMIT = 96  # rows that a picture made of characters can have
EXACT_LIMIT = 1024  # rows up to which an [S, S] array is made; beyond, one value per block

_SHADES = " .:-=+*#%@"


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """One token of a layout."""

    index: int
    text: str
    role: str  # system, user, thought, response, tool or template
    turn: int  # the turn that it belongs to, or leads to; -1: unknown
    position: int
    until: int
    targets: tuple[str, ...]  # what the row is trained to predict, with the weight unless it is 1


def token_rows(layout: Layout, samples: Sequence[Sample], tokenizer: Tokenizer) -> list[TokenRow]:
    """The tokens of a layout in order.

    Args:
      samples: those of the layout's paths, in that order (`layouts.Report.fitted` has them).
        Roles come from their renderings; samples made of tokens alone have the role "?".
    """
    roles, turns = _roles(layout, samples)
    targets: list[list[str]] = [[] for _ in range(layout.length)]
    edges = zip(layout.edge_rows, layout.edge_targets, layout.edge_weights, strict=True)
    for row, target, weight in edges:
        text = _visible(tokenizer.token_text(int(target)))
        targets[row].append(text if weight == 1 else f"{text} x{weight:g}")
    return [
        TokenRow(
            index=index,
            text=_visible(tokenizer.token_text(int(layout.tokens[index]))),
            role=roles[index],
            turn=turns[index],
            position=int(layout.positions[index]),
            until=int(layout.until[index]),
            targets=tuple(targets[index]),
        )
        for index in range(layout.length)
    ]


def _roles(layout: Layout, samples: Sequence[Sample]) -> tuple[list[str], list[int]]:
    """Role and turn per row. A row that no path holds is the context copy of the last response."""
    if len(samples) != len(layout.paths):
        raise ValueError(f"{len(samples)} samples for a layout of {len(layout.paths)}")
    last = max((sample.turn for sample in samples), default=-1)
    roles = ["response"] * layout.length
    turns = [last] * layout.length
    for path, sample in zip(reversed(layout.paths), reversed(samples), strict=True):
        if sample.rendering is None:
            for row in path.tolist():
                roles[row], turns[row] = "?", sample.turn
            continue
        turn = 0
        for row, span in zip(path.tolist(), token_spans(sample), strict=True):
            turn = turn if span is None else span.turn
            roles[row], turns[row] = ("template" if span is None else span.role), turn
    # What is trained is the assistant's to the last token, delimiters and end of turn included.
    for path, sample in zip(reversed(layout.paths), reversed(samples), strict=True):
        start = response_start(sample)
        for index in range(sample.prompt_length, len(path)):
            row = path[index]
            turns[row] = sample.turn
            if start is not None:
                roles[row] = "thought" if index < start else "response"
    return roles, turns


def _visible(text: str) -> str:
    """A token's text on one line, with spaces that can be seen."""
    return text.encode("unicode_escape").decode("ascii").replace(" ", "·") if text else "''"


def table(layout: Layout, samples: Sequence[Sample], tokenizer: Tokenizer) -> str:
    """`token_rows` as text with a header: index, token, role, turn, position, until, targets."""
    header = ("index", "token", "role", "turn", "position", "until", "targets")
    lines = [header]
    for row in token_rows(layout, samples, tokenizer):
        numbers = (str(row.turn), str(row.position), str(row.until))
        lines.append((str(row.index), row.text, row.role, *numbers, " | ".join(row.targets)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    right = (True, False, False, True, True, True, False)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def occupancy(until: np.ndarray, block: int) -> np.ndarray:
    """The fraction of visible pairs per block of rows and block of keys.

    Args:
      until: [S] int32; row i sees key j iff j <= i < until[j].
      block: rows and keys per block.

    Returns:
      [n, n] float64 with n = ceil(S / block), rows first. Pairs beyond S count as hidden. Memory is
      block x n and n x n, never S x S.
    """
    size = len(until)
    count = -(-size // block)
    bounds = np.minimum(np.arange(count + 1, dtype=np.int64) * block, size)
    out = np.zeros((count, count))
    for column in range(count):
        keys = np.arange(bounds[column], bounds[column + 1])
        ends = np.maximum(until[keys], keys)
        # Rows before each bound that see each key; differences are the rows of each block.
        before = np.clip(bounds[None, :], keys[:, None], ends[:, None]) - keys[:, None]
        out[:, column] = np.diff(before.sum(axis=0)) / block**2
    return out


def picture(until: np.ndarray, limit: int = TEXT_LIMIT) -> str:
    """What rows see, as characters: one line per row, `#` for a visible key.

    Beyond `limit` rows each character stands for a block, darker the more of it is visible.
    """
    size = len(until)
    if size <= limit:
        rows = np.arange(size)
        seen = (rows[None, :] <= rows[:, None]) & (rows[:, None] < until[None, :])
        return "\n".join("".join("#" if x else "." for x in row) for row in seen)
    block = -(-size // limit)
    shares = occupancy(until, block)
    # Anything visible shows: only a block without a single pair is blank.
    levels = np.ceil(shares * (len(_SHADES) - 1)).astype(int).clip(0, len(_SHADES) - 1)
    lines = ["".join(_SHADES[level] for level in row) for row in levels]
    return "\n".join([*lines, f"({size} rows, {block} x {block} pairs per character)"])


def save_picture(layout: Layout, path: str | pathlib.Path, title: str = "") -> None:
    """Writes the picture as a PNG: each pair up to `EXACT_LIMIT` rows, else a value per block."""
    from matplotlib import figure  # here, for only a picture needs it, and it is slow to load

    size = layout.length
    block = -(-size // EXACT_LIMIT) if size > EXACT_LIMIT else 1
    shares = occupancy(layout.until, block)
    canvas = figure.Figure(figsize=(7, 7.4), layout="constrained", dpi=150)
    axes = canvas.subplots()
    end = len(shares) * block - 0.5
    axes.imshow(
        shares,
        cmap="Greys",
        vmin=0,
        vmax=1,
        interpolation="nearest" if block == 1 else "antialiased",
        extent=(-0.5, end, end, -0.5),
    )
    trained = np.unique(layout.edge_rows)
    axes.plot(np.full(len(trained), -0.012 * size), trained, "|", color="tab:red", markersize=2)
    axes.set_xlim(-0.025 * size, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.set_xlabel("key")
    axes.set_ylabel("row (red: trained)")
    pairs, causal = layout.pairs, size * (size + 1) // 2
    what = (
        f"{size} tokens, {layout.num_edges} trained, {pairs / max(causal, 1):.0%} of causal pairs"
    )
    scale = "" if block == 1 else f", {block} x {block} pairs per point"
    axes.set_title("\n".join(filter(None, (title, what + scale))), fontsize=9)
    canvas.savefig(path, format="png")
