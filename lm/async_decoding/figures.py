# SPDX-License-Identifier: Apache-2.0
"""Figures of async decoding from rows alone: quality against speed-up, the front by round, speed of
given programs, and the threads of an answer over time."""

import itertools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from lm import plots
from lm.async_decoding import benchmark, evaluate, front, preference
from lm.errors import UserError
from lm.workdir import Workdir

Row = Mapping[str, Any]
SPEEDS = {
    "speedup_critical_path": "speed-up on the critical path over sequential decoding",
    "speedup_wall": "speed-up in wall-clock time over sequential decoding, batch 1",
}
_COLOURS = {
    "async": "#0072B2",
    "sequential": "#000000",
    "sot": "#D55E00",
    "apar": "#009E73",
}
_BLOCKS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00")
_KEYS = (
    *("kind", "method", "lambda", "round", "source", "scorer", "seed", "batch", "device"),
    *("threads", "prompt_tokens", "layers", "compose", "checkpoint"),
)


def gather(paths: Iterable[pathlib.Path]) -> list[Row]:
    """The rows of workdirs and of JSONL files, later ones replacing earlier ones of the same
    setting. Raises UserError for a path that is neither, or when there is nothing to draw."""
    found: dict[tuple[str, ...], Row] = {}
    for path in paths:
        if path.is_dir():
            workdir = Workdir(path)
            rows = [*workdir.rows("eval.jsonl"), *workdir.rows("benchmark.jsonl")]
        elif path.is_file():
            rows = Workdir(path.parent).rows(path.name)
        else:
            raise UserError(f"{path}: no such workdir or file of rows")
        for row in rows:
            if row.get("kind") in (evaluate.KIND, preference.KIND, benchmark.KIND):
                found[tuple(json.dumps(row.get(key)) for key in _KEYS)] = row
    if not found:
        raise UserError("no row of async decoding: run async_decoding.evaluate or .benchmark first")
    return list(found.values())


def timelines(paths: Iterable[pathlib.Path]) -> dict[str, Mapping[str, Any]]:
    """Of each workdir the kept answer with the most threads, where it has several; by its
    method."""
    out = {}
    for path in paths:
        files = sorted((path / evaluate.FOLDER).glob("*.json"), key=lambda f: f.stat().st_mtime)
        if not files:
            continue
        kept = json.loads(files[-1].read_text())
        several = [one for one in kept["timelines"] if len(one["threads"]) > 1]
        if several:
            out[label_of(kept["about"])] = several[0]
    return out


def draw(
    rows: Sequence[Row], answers: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Figure]:
    """Every figure that rows and kept answers allow, by name."""
    found = {}
    measured = [row for row in rows if row["kind"] == evaluate.KIND]
    least = min((row["batch"] for row in measured), default=1)
    measured = [row for row in measured if row["batch"] == least]  # others would be drawn twice
    for name in SPEEDS:
        shown = [row for row in measured if row.get(name)]
        if any(row["method"] != "sequential" for row in shown):
            found[name.replace("speedup", "front")] = pareto(shown, name)
    rounds = [row for row in rows if row["kind"] == preference.KIND]
    if rounds:
        found["front_by_round"] = by_round(rounds)
    timed = [row for row in rows if row["kind"] == benchmark.KIND and row["threads"]]
    if timed:
        found["benchmark"] = speeds(timed)
    for name, answer in (answers or {}).items():
        plain = name.replace("λ=", "lambda ").replace("∞", "inf")  # in names of files
        slug = "".join(letter if letter.isalnum() else "_" for letter in plain)
        found[f"timeline_{slug}"] = timeline(answer, name)
    return found


def label_of(row: Row) -> str:
    """What a row's run is called: `async predicted`, with `λ=2` after preference optimisation, and
    what it was put together with."""
    weight, name = row.get("lambda"), row["method"]
    if weight is not None:
        name += f" λ={'∞' if weight == 'inf' else format(weight, 'g')}"
    composed = row.get("compose") or "none"
    return name if composed == "none" or composed in name else f"{name} {composed}"


def _short(row: Row) -> str:
    """The name of a point where only one method has lambdas."""
    return (
        label_of(row).removeprefix(row["method"] if row.get("lambda") is not None else "").strip()
    )


def colour(method: str) -> str:
    """The colour of a method's family."""
    return _COLOURS.get(method.split(" ")[0]) or plots.colour(method)


@plots.styled
def pareto(rows: Sequence[Row], speed: str) -> Figure:
    """Quality against a speed-up, a point per row with its 95 % intervals, and the front of all of
    them. Squares are trained on data alone, circles by preference; what one method reaches with
    different lambdas is joined."""
    figure, axes = plots.new_figure(6.6, 4.2)
    for row in rows:
        x, y = row[speed], row["quality"]
        reach = [
            [[max(v - low, 0)], [max(high - v, 0)]]
            for v, (low, high) in ((x, row[f"{speed}_ci95"]), (y, row["quality_ci95"]))
        ]
        preferred = row.get("lambda") is not None
        axes.errorbar(
            x,
            y,
            xerr=reach[0],
            yerr=reach[1],
            color=colour(row["method"]),
            marker="o" if preferred else "s",
            markersize=6,
            elinewidth=0.9,
            capsize=2,
            linestyle="none",
        )
    points = [(row["quality"], row[speed]) for row in rows]
    best = [points[i] for i in front.front(points)]
    axes.step(
        [x for _, x in best], [y for y, _ in best], where="pre", color="#999999", linewidth=1.2,
        linestyle=(0, (3, 2)), zorder=0,
        label=f"Pareto front, area {front.hypervolume(points):.3f}",
    )  # fmt: skip
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [r for r in rows if r["method"] == method and r.get("lambda") is not None]
        own.sort(key=lambda r: math.inf if r["lambda"] == "inf" else r["lambda"])
        if len(own) > 1:
            axes.plot([r[speed] for r in own], [r["quality"] for r in own], color=colour(method))
    axes.axvline(1, color="#cccccc", linewidth=1)
    axes.margins(x=0.17, y=0.16)
    methods = {row["method"] for row in rows if row.get("lambda") is not None}
    names = [_short(row) if len(methods) == 1 else label_of(row) for row in rows]
    _name_points(
        axes,
        [
            (name, row[speed], row["quality"], row["method"])
            for name, row in zip(names, rows, strict=True)
        ],
    )
    axes.set_xlabel(SPEEDS[speed])
    axes.set_ylabel(f"quality ({rows[0].get('scorer', 'task')}, 95 % intervals)")
    axes.legend(loc="lower left", frameon=False)
    return figure


def _name_points(axes: Any, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Writes each name beside its point, at the first of a few places where no other name or point
    is."""
    axes.figure.draw_without_rendering()  # settles the layout, which places are measured in
    dots = 72 / axes.figure.dpi
    where = [axes.transData.transform((x, y)) * dots for _, x, y, _ in points]
    taken = [(across - 4, across + 4, up - 4, up + 4) for across, up in where]  # in points
    # from the top: leaders to names further off do not cross
    for index in sorted(range(len(points)), key=lambda i: -points[i][2]):
        (name, x, y, method), (across, up) = points[index], where[index]
        width = max(5.0 * len(name), 24.0)
        for offset, right in itertools.product((5, -13, 17, -25, 29, -37), (1, 0)):
            left = across + 6 if right else across - 6 - width
            box = (left, left + width, up + offset, up + offset + 9)
            if not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        far = not -14 < offset < 6  # then a line says whose name it is
        axes.annotate(
            name,
            (x, y),
            (6 if right else -6, offset),
            textcoords="offset points",
            ha="left" if right else "right",
            color=colour(method),
            fontsize=8.5,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],  # above lines
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.8} if far else None,
            zorder=4,
        )


def _overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two boxes (left, right, bottom, top) share some of their area."""
    across = first[0] < second[1] and second[0] < first[1]
    return across and first[2] < second[3] and second[2] < first[3]


@plots.styled
def by_round(rows: Sequence[Row]) -> Figure:
    """Where each round of preference optimisation leaves the policy, a line per lambda from the
    policy that it started from."""
    figure, axes = plots.new_figure(6.6, 4.0)
    palette = dict(zip(sorted({str(r["lambda"]) for r in rows}), _BLOCKS, strict=False))
    names: list[str] = []
    numbers: dict[tuple[float, float], list[str]] = {}  # of the rounds at a place
    for weight, shade in palette.items():
        own = sorted((r for r in rows if str(r["lambda"]) == weight), key=lambda r: r["round"])
        x, y = [r["speedup_critical_path"] for r in own], [r["quality"] for r in own]
        axes.plot(x, y, color=shade, marker="o", markersize=9)
        for row, place in zip(own, zip(x, y, strict=True), strict=True):
            numbers.setdefault(place, []).append(str(row["round"]))
        area = own[-1]["hypervolume"]
        names.append(f"λ={'∞' if weight == 'inf' else f'{float(weight):g}'}  area {area:.3f}")
    for place, found in numbers.items():
        text = ",".join(dict.fromkeys(found))
        axes.annotate(text, place, ha="center", va="center", fontsize=7)
    axes.legend(axes.lines, names, frameon=False)
    axes.margins(0.12)
    axes.set_xlabel(SPEEDS["speedup_critical_path"])
    axes.set_ylabel("quality of greedy answers to held-out questions")
    axes.set_title("After each round of preference optimisation")
    return figure


@plots.styled
def speeds(rows: Sequence[Row]) -> Figure:
    """What given programs gain over their texts in a row: a bar for the time, a mark for steps."""
    figure, axes = plots.new_figure(7.0, 1.0 + 0.36 * len(rows))
    for place, row in enumerate(rows):
        wall, path = row["wall_speedup"], row["critical_path_speedup"]
        shade = _COLOURS["async"] if row["compose"] == "none" else _COLOURS["apar"]
        axes.barh(place, wall, height=0.62, color=shade)
        axes.plot([path, path], [place - 0.36, place + 0.36], color="black", linewidth=2)
        axes.annotate(
            f"{row['realised']:.0%}", (max(wall, path), place), (6, 0),
            textcoords="offset points", va="center", fontsize=8.5,
        )  # fmt: skip
    labels = [f"{row['method']}, {row['threads']} at once, batch {row['batch']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(max(r["wall_speedup"], r["critical_path_speedup"]) for r in rows))
    axes.axvline(1, color="#999999", linewidth=1, linestyle=(0, (3, 2)))
    axes.grid(False, axis="y")
    axes.set_xlabel(
        "speed-up over the same text in a row: time (bar), steps (mark), share realised"
    )
    return figure


@plots.styled
def timeline(answer: Mapping[str, Any], title: str = "") -> Figure:
    """The threads of an answer over decoder steps: main on top, gaps where it waits; the opening of
    a block, which is put there, is hatched. What the same tokens take in a row is said below."""
    threads = answer["threads"]
    figure, axes = plots.new_figure(8.0, 1.1 + 0.34 * len(threads))
    total = 0
    for place, thread in enumerate(threads):
        shade = _COLOURS["sequential"] if not place else _BLOCKS[(place - 1) % len(_BLOCKS)]
        spans = thread["spans"]
        if not spans:
            continue
        first = spans[0][0] - 1
        if thread["opening"]:
            axes.add_patch(
                Rectangle(
                    (first - thread["opening"] + 1, place - 0.31), thread["opening"] - 1, 0.62,
                    facecolor="white", edgecolor=shade, hatch="////", linewidth=0.6,
                )
            )  # fmt: skip
        for low, high in spans:
            axes.add_patch(
                Rectangle((low - 1, place - 0.31), high - low + 1, 0.62, facecolor=shade)
            )
            total += high - low + 1
        for before, after in itertools.pairwise(spans):
            axes.plot([before[1], after[0] - 1], [place, place], color="#999999", linewidth=1)
            if after[0] - before[1] < 0.05 * answer["steps"]:
                continue  # no room for a word
            axes.annotate(
                "waits", ((before[1] + after[0]) / 2, place), (0, 2), textcoords="offset points",
                ha="center", color="#777777", fontsize=7.5,
            )  # fmt: skip
        if place:
            fork = first - thread["opening"] + 1
            axes.plot([fork, fork], [0.31, place - 0.31], color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(threads)), [thread["label"][:24] for thread in threads])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(threads) - 0.4, -0.6)
    axes.set_xlim(0, answer["steps"] * 1.01)
    axes.grid(False, axis="y")
    axes.set_xlabel(
        f"decoder steps: {answer['steps']} for {total} tokens, {total / answer['steps']:.2f} a step"
    )
    if title:
        axes.set_title(title)
    return figure


def save(figures: Mapping[str, Figure], folder: pathlib.Path) -> list[str]:
    """Writes each figure as a PNG and returns the paths. Raises UserError when it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = {name: folder / f"{name}.png" for name in figures}
        for name, figure in figures.items():
            paths[name].write_bytes(plots.png(figure))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    return [str(path) for path in paths.values()]
