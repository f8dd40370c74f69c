# SPDX-License-Identifier: Apache-2.0
"""Figures of what rank buys, from rows alone: nothing is measured here."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lm import plots
from lm.cp_heads.evaluate import NAMES
from lm.errors import UserError
from lm.workdir import Workdir

Row = Mapping[str, Any]
FILES = ("eval.jsonl", "benchmark.jsonl")
_OTHER_KINDS = ("training", "greedy_check")
_MOST_LENGTHS = 3  # lines per transition, so that a figure stays readable


def gather(paths: Iterable[pathlib.Path]) -> list[Row]:
    """The rows of workdirs and of JSONL files, later ones replacing earlier ones of the same
    method and setting. Raises UserError for a path that is neither, or when no row is about heads.
    """
    rows = latest([row for path in paths for row in _rows(path)])
    if not any(map(_rank, rows)):
        raise UserError("no row of a CP head: run experiments.cp_heads.evaluate or benchmark first")
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """Rows of methods, without those that a later one of the same method and setting replaces."""
    keys = ("kind", "method", "n", "temperature", "top_k", "top_p", "batch", "source", "device")
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if "method" in row and row.get("kind") not in _OTHER_KINDS:
            found[tuple(json.dumps(row.get(key)) for key in keys)] = row
    return [row for row in found.values() if _rank(row) or "tokens_per_s" in row]


def _rows(path: pathlib.Path) -> list[Row]:
    if path.is_dir():
        workdir = Workdir(path)
        return [row for name in FILES for row in workdir.rows(name)]
    if not path.is_file():
        raise UserError(f"{path}: no such workdir or file of rows")
    return Workdir(path.parent).rows(path.name)


def _rank(row: Row) -> int | None:
    return row.get("rank") if row.get("transition") in NAMES else None


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """Every figure that the rows allow, by name: tokens per call and tokens/s against rank, one of
    each for every temperature."""
    found = {}
    for temperature in sorted({row.get("temperature") or 0.0 for row in rows}):
        here = [row for row in rows if (row.get("temperature") or 0.0) == temperature]
        suffix = f"t{temperature:g}" if temperature else "greedy"
        lines = lines_of(here, "expected_tokens_per_call", "stderr")
        if lines:
            figure = plots.by_rank(lines, "expected tokens per trunk call (95 % interval)")
            found[f"acceptance_{suffix}"] = figure
        lines = lines_of(here, "tokens_per_s")
        if lines:
            others = {row["method"]: row["tokens_per_s"] for row in here if _is_baseline(row)}
            found[f"speed_{suffix}"] = plots.by_rank(lines, "tokens/s, batch 1", others)
    return found


def _is_baseline(row: Row) -> bool:
    """Methods without a rank; trees of drafts belong to no line."""
    other = _rank(row) is None and "chains" not in row
    return other and row.get("tokens_per_s") is not None and _single(row)


def _single(row: Row) -> bool:
    return row.get("batch", 1) == 1


def lines_of(
    rows: Sequence[Row], value: str, error: str = ""
) -> dict[str, list[tuple[int, float, float]]]:
    """(rank, value, half of the 95 % interval) by transition and draft length.

    Of many lengths the longest and two shorter ones are shown. Rank 1 has no transitions: its point
    begins every line of its length.
    """
    known = [row for row in rows if _rank(row) and row.get(value) is not None and _single(row)]
    lengths = sorted({row["n"] for row in known if row["n"] > 1})
    if len(lengths) > _MOST_LENGTHS:
        longest = lengths[-1]
        lengths = sorted({lengths[0], min(lengths, key=lambda n: abs(n - longest / 2)), longest})
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for length in lengths:
        here = [row for row in known if row["n"] == length]
        kinds = dict.fromkeys(row["transition"] for row in here if row["rank"] > 1)
        for kind in kinds or {"identity": None}:
            points = {
                row["rank"]: (row["rank"], row[value], 1.96 * (row.get(error) or float("nan")))
                for row in here
                if row["rank"] == 1 or row["transition"] == kind
            }
            lines[f"{NAMES[kind]} n={length}"] = sorted(points.values())
    return lines


def save(figures: Mapping[str, Figure], folder: pathlib.Path) -> list[str]:
    """Writes each figure as a PNG and returns the paths. Raises UserError when it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = {name: folder / f"{name}_by_rank.png" for name in figures}
        for name, figure in figures.items():
            paths[name].write_bytes(plots.png(figure))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    return [str(path) for path in paths.values()]
