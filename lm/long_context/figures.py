# SPDX-License-Identifier: Apache-2.0
"""Figures of what reading less buys and costs, from rows alone: nothing is measured here."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lm import plots
from lm.errors import UserError
from lm.long_context.options import QUESTIONS
from lm.workdir import Workdir

Row = Mapping[str, Any]
FILES = ("eval.jsonl", "benchmark.jsonl")
_DENSE = "dense"
_KEYS = (
    "kind", "method", "by", "stage", "mode", "shadow", "task", "length", "budget", "seed",
    "tokens", "context", "batch", "layers", "prompt", "checkpoint", "device", "questions", "draft",
)  # fmt: skip
_BETWEEN = ("copy", "rest", "attention")  # not stages of one layer's step


def gather(paths: Iterable[pathlib.Path]) -> list[Row]:
    """The rows of workdirs and of JSONL files, later ones replacing earlier ones of the same
    setting. Raises UserError for a path that is neither, or when there is nothing to draw."""
    found: dict[tuple[str, ...], Row] = {}
    for path in paths:
        for row in _rows(path):
            found[tuple(json.dumps(row.get(key)) for key in _KEYS)] = row
    rows = list(found.values())
    if not draw(rows):
        raise UserError("no row to draw: run evaluate or benchmark first")
    return rows


def _rows(path: pathlib.Path) -> list[Row]:
    if path.is_dir():
        workdir = Workdir(path)
        return [row for name in FILES for row in workdir.rows(name)]
    if not path.is_file():
        raise UserError(f"{path}: no such workdir or file of rows")
    return Workdir(path.parent).rows(path.name)


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """Every figure that the rows allow, by name."""
    found: dict[str, Figure] = {}
    whole = [row for row in rows if "task" in row and row.get("accuracy") is not None]
    # rows from before there were two kinds have none
    whole = [{"questions": QUESTIONS[0], **row} for row in _by_draft(whole)]
    for kind, scored in _grouped(whole, "questions").items():
        apart = "" if kind == QUESTIONS[0] else f"_{kind}"
        found |= {f"{name}{apart}": one for name, one in _accuracy(scored).items()}
    for mode in ("decode", "chunk"):
        shown = stages([row for row in rows if row.get("mode") == mode])
        if shown:
            found[f"stages_{mode}"] = plots.rates(shown, "ms of a layer")
    timed = [row for row in rows if "context" in row and row.get("batch", 1) == _batch(rows)]
    for name, key, label in (
        ("latency", "tpot_ms_p50", "ms a token"),
        ("first_token", "ttft_ms", "ms to the first token"),
        ("request", "total_ms", "ms of a request"),
        ("memory", "peak_bytes", "bytes at most"),
        ("cache", "prefill_cache_bytes", "bytes of keys and values during prefill"),
    ):
        if key == "peak_bytes" and not any(row.get("kind") == "request" for row in timed):
            continue  # elsewhere it is of compiled programs, of which methods have others
        lines = by_context(timed, key)
        if lines:
            ylabel = f"{label}, batch {_batch(rows)}"
            found[name] = plots.by_size(lines, "tokens of the prompt", ylabel, log=True)
    return found


def _accuracy(scored: Sequence[Row]) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    for length in sorted({row["length"] for row in scored}):
        here = [row for row in scored if row["length"] == length]
        lines = accuracy_by_budget(here)
        if lines:
            dense = _mean([row for row in here if row["method"] == _DENSE])
            found[f"accuracy_by_budget_{length}"] = plots.by_size(
                lines,
                f"tokens that a step reads, of {length:,}",
                "accuracy (95 % interval)",
                {} if dense is None else {_DENSE: dense[0]},
            )
    if scored:
        found["accuracy_by_task"] = plots.rates(accuracy_by_task(scored), "accuracy")
    return found


def _by_draft(rows: Sequence[Row]) -> list[Row]:
    """The rows, methods called after their draft too where a checkpoint was judged with several."""
    drafts: dict[tuple[Any, Any], set[str]] = {}
    for row in rows:
        drafts.setdefault((row.get("checkpoint"), row["method"]), set()).add(row.get("draft"))
    several = {method for (_, method), known in drafts.items() if len(known) > 1}
    return [
        {**row, "method": f"{row['method']} {pathlib.PurePath(row.get('draft') or '?').name}"}
        if row["method"] in several
        else row
        for row in rows
    ]


def _batch(rows: Sequence[Row]) -> int:
    """The smallest that was timed."""
    return min((row.get("batch", 1) for row in rows if "context" in row), default=1)


def _mean(rows: Sequence[Row]) -> tuple[float, float] | None:
    """Mean accuracy over tasks and half of its 95 % interval, as of one large sample."""
    if not rows:
        return None
    mean = float(np.mean([row["accuracy"] for row in rows]))
    low, high = plots.interval(mean, sum(row.get("samples", 1) for row in rows))
    return mean, (high - low) / 2


def accuracy_by_budget(rows: Sequence[Row]) -> dict[str, list[tuple[int, float, float]]]:
    """(budget, mean over tasks, half of its interval) by method; only where all of the method's
    tasks are there."""
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for method, own in _grouped(rows, "method").items():
        if method == _DENSE:
            continue
        tasks = {row["task"] for row in own}
        for budget, here in _grouped(own, "budget").items():
            if {row["task"] for row in here} == tasks:
                lines.setdefault(method, []).append((budget, *_mean(here)))
    return lines


def accuracy_by_task(rows: Sequence[Row]) -> list[Row]:
    """Bars of every task and length, at the smallest budget that all methods were asked at."""
    out = []
    for length, here in _grouped(rows, "length").items():
        others = [row for row in here if row["method"] != _DENSE]
        asked = [{r["budget"] for r in own} for own in _grouped(others, "method").values()]
        common = set.intersection(*asked) if asked else set()
        budget = min(common or {row["budget"] for row in others}, default=None)
        shown = [r for r in here if r["method"] == _DENSE or r["budget"] == budget]
        for (method, task), same in _grouped(shown, "method", "task").items():
            mean = _mean(same)[0]  # over seeds
            about = {"implementation": method, "case": task, "length": length}
            out.append(about | {"tflops": mean})
    return out


def stages(rows: Sequence[Row]) -> list[Row]:
    """Bars of the stages of one layer, the copy and whole steps aside."""
    return [
        {
            "implementation": " ".join(filter(None, (_by(row), row.get("shadow")))),
            "case": row["stage"],
            "length": row["tokens"],
            "tflops": row["ms"],
        }
        for row in rows
        if "ms" in row and row.get("stage") not in (None, *_BETWEEN)
    ]


def _by(row: Row) -> str:
    """The implementation; the kernel benchmark's own rows have it as their method."""
    return row.get("by") or row.get("method") or ""


def by_context(rows: Sequence[Row], key: str) -> dict[str, list[tuple[int, float, float]]]:
    """(context, ms, NaN) by method, without what did not run."""
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for row in rows:
        if row.get(key) is not None:
            lines.setdefault(row["method"], []).append((row["context"], row[key], float("nan")))
    return lines


def _grouped(rows: Sequence[Row], *keys: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys)
        groups.setdefault(key, []).append(row)
    return groups


def save(figures: Mapping[str, Figure], folder: pathlib.Path) -> list[str]:
    """Writes each figure as a PNG and returns the paths. Raises UserError when it cannot."""
    paths = {name: folder / f"{name}.png" for name in figures}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            paths[name].write_bytes(plots.png(figure))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    return [str(path) for path in paths.values()]
