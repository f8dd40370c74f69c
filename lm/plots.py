# SPDX-License-Identifier: Apache-2.0
"""Figures of the rows that runs leave behind: one function each, returning a matplotlib `Figure`.

A method keeps its colour in every figure: colours of Okabe and Ito, which colour-blind readers can
tell apart. Nothing here runs a model or knows a paper: rows are dicts with a `method`.
"""

import functools
import io
import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = Mapping[str, Any]

DPI = 130

_COLOURS = {
    "tree": "#0072B2",
    "n_pass": "#D55E00",
    "n_pass_merged": "#E69F00",
    "paper": "#009E73",
    "k_pass": "#CC79A7",
    "cp": "#0072B2",
    "hmm": "#D55E00",
    "hydra": "#009E73",
    "draft_model": "#CC79A7",
    "token_select": "#0072B2",
    "streaming_llm": "#D55E00",
    "quest": "#E69F00",
    "snapkv": "#009E73",
    "infllm": "#CC79A7",
    "h2o": "#56B4E9",
    "dense": "#000000",
    "random": "#8C6D31",
}
_OTHERS = ("#56B4E9", "#000000", "#8C6D31", "#6A51A3")
_MORE = ("#999999", "#F0E442", "#44AA99", "#882255", "#117733", "#AA4499", "#332288", "#DDCC77")
_LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
}
_MARKS = {"markersize": 4.5, "elinewidth": 1.1, "capsize": 2.5}
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def colour(method: str) -> str:
    """The colour of a method, always the same one; `k_pass:K` shares one for all K."""
    name = method.split(":")[0].split(" ")[0]
    return _COLOURS.get(name) or _OTHERS[sum(name.encode()) % len(_OTHERS)]


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as a PNG without a date, so that the same rows give the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def short(value: float, unit: str = "") -> str:
    """A number with three significant digits and an SI prefix: 1234567 -> "1.23 M"."""
    if not math.isfinite(value):
        return "n/a"
    for scale, prefix in _PREFIXES:
        if abs(value) >= 0.9995 * scale:
            return f"{value / scale:#.3g}".rstrip(".") + f" {prefix}{unit}"
    digits = f"{value:.3g}"
    return f"{digits} {unit}".rstrip()


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapped


@_styled
def loss_by_step(runs: Mapping[str, Sequence[Row]]) -> Figure:
    """Training loss per token against optimiser steps.

    runs: per label the rows of metrics.jsonl. A label starts with the method, its colour.
    """
    lines = {
        label: [(row["step"], row["loss_per_token"]) for row in rows]
        for label, rows in runs.items()
    }
    return _losses(lines, "optimiser step")


@_styled
def loss_by_time(runs: Mapping[str, Sequence[Row]]) -> Figure:
    """Training loss per token against the time spent training, compilation not included."""
    lines = {}
    for label, rows in runs.items():
        times = elapsed(rows)
        lines[label] = [(t, row["loss_per_token"]) for t, row in zip(times, rows, strict=True)]
    return _losses(lines, "training time, s")


def elapsed(rows: Sequence[Row]) -> list[float]:
    """Seconds of training up to each row of metrics.jsonl, from the step times in between."""
    total, before, out = 0.0, 0, []
    for row in rows:
        total += (row["step"] - before) * row["step_ms"] / 1e3
        before = row["step"]
        out.append(total)
    return out


def _losses(lines: Mapping[str, Sequence[tuple[float, float]]], xlabel: str) -> Figure:
    figure, axes = _new(6.4, 3.5)
    for (label, points), style in zip(lines.items(), _line_styles(lines), strict=True):
        points = [(x, y) for x, y in points if y is not None]
        axes.plot(*zip(*points, strict=True), color=colour(label), linestyle=style)
    if any(y > 0 for points in lines.values() for _, y in points if y is not None):
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("training loss, nats per token")
    axes.set_xlim(left=0)
    _label_ends(axes, list(lines))
    return figure


@_styled
def exact_match_by_depth(rows: Sequence[Row]) -> Figure:
    """Share of turns answered exactly, by turn of the conversation, with 95 % Wilson intervals.

    rows: of eval.jsonl, with method, depth, exact_match and n, the number of answers.
    """
    figure, axes = _new(6.4, 3.5)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    offsets = [0.04 * (i - (len(methods) - 1) / 2) for i in range(len(methods))]
    styles = _line_styles(methods)
    for method, offset, style in zip(methods, offsets, styles, strict=True):
        points = sorted((row for row in rows if row["method"] == method), key=lambda r: r["depth"])
        x = [row["depth"] + offset for row in points]
        y = [row["exact_match"] for row in points]
        bounds = [interval(row["exact_match"], row["n"]) for row in points]
        reach = [
            [
                max(v - b[i], 0) if i == 0 else max(b[i] - v, 0)
                for v, b in zip(y, bounds, strict=True)
            ]
            for i in (0, 1)
        ]
        axes.errorbar(
            x,
            y,
            yerr=reach,
            color=colour(method),
            marker="o",
            linestyle=style,
            **_MARKS,
        )
    axes.set_ylim(0, 1.03)
    depths = sorted({row["depth"] for row in rows})
    axes.set_xticks(depths)
    axes.set_xlim(depths[0] - 0.3, depths[-1] + 0.3)
    axes.set_xlabel("turn of the conversation")
    axes.set_ylabel("exact match (95 % interval)")
    _label_ends(axes, methods, containers=True)
    return figure


def interval(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share seen in `count` trials."""
    if count <= 0:
        return 0.0, 1.0
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def difference(
    first: float, first_count: float, last: float, last_count: float
) -> tuple[float, float]:
    """Newcombe's 95 % interval of the difference of two independent shares, first minus last."""
    a, b = interval(first, first_count), interval(last, last_count)
    low = math.hypot(first - a[0], b[1] - last)
    high = math.hypot(a[1] - first, last - b[0])
    return first - last - low, first - last + high


@_styled
def costs(modes: Mapping[str, Row | None]) -> Figure:
    """Tokens, attention pairs and model FLOPs per mode of a plan; refused ones (None) left out."""
    shown = {name: row for name, row in modes.items() if row is not None}
    panels = (
        ("tokens", "tokens", ""),
        ("pairs", "attention pairs", ""),
        ("flops", "model FLOPs", ""),
    )
    panels = tuple(p for p in panels if all(p[0] in row for row in shown.values()))
    return _bars(shown, panels)


@_styled
def speed(rows: Sequence[Row]) -> Figure:
    """Step time and conversations per second, of the rows of benchmark.jsonl."""
    shown = {row["method"]: row for row in rows}
    panels = (
        ("step_ms", "step time, ms", ""),
        ("conversations_per_s", "conversations per second", ""),
    )
    return _bars(shown, tuple(p for p in panels if all(p[0] in row for row in shown.values())))


@_styled
def rates(
    rows: Sequence[Row], ylabel: str = "TFLOP/s on visible pairs", unit: str = "tokens"
) -> Figure:
    """TFLOP/s of an op, a panel per length (in units) and a group of bars per mask or other case.

    rows: with implementation, case, length and tflops; one per implementation, mask and length.
    """
    lengths = sorted({row["length"] for row in rows})
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    known = {name: _COLOURS[name] for name in names if name in _COLOURS}
    every = dict.fromkeys((*_COLOURS.values(), *_OTHERS, *_MORE))
    free = [one for one in every if one not in known.values()]
    others = [name for name in names if name not in known]
    palette = known | dict(zip(others, itertools.cycle(free), strict=False))
    inches = max(6.4, 1.6 + 0.9 * len(cases) * len(lengths))
    figure, axes = _new(inches, 3.7, columns=len(lengths))
    highest = max(row["tflops"] for row in rows)
    width = 0.85 / len(names)
    for column, length in enumerate(lengths):
        panel = axes[column] if len(lengths) > 1 else axes
        for place, name in enumerate(names):
            shown = [r for r in rows if r["implementation"] == name and r["length"] == length]
            x = [cases.index(row["case"]) + width * (place - len(names) / 2) for row in shown]
            y = [row["tflops"] for row in shown]
            panel.bar(x, y, width, align="edge", color=palette[name], label=name)
        labels = [textwrap.fill(case.replace("_", " "), 11) for case in cases]
        panel.set_xticks(range(len(cases)), labels)
        panel.set_ylim(0, 1.05 * highest or 1.0)
        panel.set_title(f"{length:,} {unit}")
        panel.grid(False, axis="x")
        if column == 0:
            panel.set_ylabel(ylabel)
    figure.legend(
        *panel.get_legend_handles_labels(), loc="outside lower center", ncols=int(inches / 1.6)
    )
    return figure


@_styled
def by_rank(
    lines: Mapping[str, Sequence[tuple[int, float, float]]],
    ylabel: str,
    baselines: Mapping[str, float] | None = None,
) -> Figure:
    """A quantity against the rank of a head, on a logarithmic axis of ranks.

    lines: per label, which starts with the method, (rank, value, half of its 95 % interval or NaN).
    baselines: methods without a rank, as horizontal lines.
    """
    return _curves(lines, "rank", ylabel, baselines)


@_styled
def by_size(
    lines: Mapping[str, Sequence[tuple[int, float, float]]],
    xlabel: str,
    ylabel: str,
    baselines: Mapping[str, float] | None = None,
    log: bool = False,
) -> Figure:
    """As `by_rank`, against a number of tokens or the like; `log`: both axes are logarithmic."""
    return _curves(lines, xlabel, ylabel, baselines, log)


def _curves(lines, xlabel, ylabel, baselines, log=False) -> Figure:
    figure, axes = _new(6.4, 3.5)
    for (label, points), style in zip(lines.items(), _line_styles(lines), strict=True):
        x, y, reach = zip(*sorted(points), strict=True)
        reach = [0.0 if math.isnan(value) else value for value in reach]
        axes.errorbar(x, y, yerr=reach, color=colour(label), linestyle=style, marker="o", **_MARKS)
    places = sorted({point[0] for points in lines.values() for point in points})
    for name, value in (baselines or {}).items():
        axes.axhline(value, color="#888888", linestyle=(0, (2, 2)), linewidth=1.2)
        place = (0, value), ("axes fraction", "data")
        axes.annotate(name, *place[:1], (3, 3), xycoords=place[1], textcoords="offset points")
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.set_xlim(places[0] / 1.2, places[-1] * 1.2)
    if log:
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    else:
        axes.set_ylim(bottom=0 if baselines else None)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _label_ends(axes, list(lines), containers=True)
    return figure


def _bars(shown: Mapping[str, Row], panels: Sequence[tuple[str, str, str]]) -> Figure:
    """Horizontal bars, one panel per quantity, each bar with its value."""
    figure, axes = _new(2.1 + 2.3 * len(panels), 0.75 + 0.36 * len(shown), columns=len(panels))
    names = list(shown)
    for column, (key, title, unit) in enumerate(panels):
        panel = axes[column] if len(panels) > 1 else axes
        values = [float(shown[name][key]) for name in names]
        places = range(len(names))
        panel.barh(places, values, height=0.62, color=[colour(name) for name in names])
        panel.set_yticks(places, names if column == 0 else [""] * len(names))
        panel.tick_params(axis="y", length=0)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_xlim(0, 1.38 * max([*values, 1e-12]))
        panel.set_xticks([])
        panel.spines["bottom"].set_visible(False)
        panel.grid(False)
        panel.set_title(title)
        for place, value in zip(places, values, strict=True):
            panel.annotate(
                short(value, unit), (value, place), (4, 0), textcoords="offset points", va="center"
            )
    return figure


def _new(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


styled, new_figure = _styled, _new  # for figures that belong to one paper


def _line_styles(labels: Sequence[str] | Mapping[str, Any]) -> list[Any]:
    """A line style for each label, so that lines of one colour differ."""
    seen: dict[str, int] = {}
    out = []
    for label in labels:
        count = seen.get(colour(label), 0)
        seen[colour(label)] = count + 1
        out.append(_LINES[count % len(_LINES)])
    return out


def _plain_log_ticks(axes: Axes) -> None:
    """1, 2, 5 and so on with plain numbers: losses rarely span more than two decades."""
    from matplotlib import ticker

    axes.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _label_ends(axes: Axes, labels: Sequence[str], containers: bool = False) -> None:
    """Writes each line's name at its right end, apart from each other where lines end together."""
    axes.figure.draw_without_rendering()  # settles the layout, which places are measured in
    lines = [c.lines[0] for c in axes.containers] if containers else axes.lines
    ends = []
    for line, label in zip(lines, labels, strict=True):
        x, y = line.get_xdata()[-1], line.get_ydata()[-1]
        ends.append((*axes.transData.transform((x, y)), (x, y), label))
    ends.sort(key=lambda end: end[0])
    groups: list[list[Any]] = []  # of names that could meet
    for end in ends:
        together = groups and end[0] - groups[-1][-1][0] < 0.15 * axes.bbox.width
        groups[-1].append(end) if together else groups.append([end])
    for group in groups:
        _label_group(axes, sorted(group, key=lambda end: end[1]))


def _label_group(axes: Axes, ends: Sequence[Any]) -> None:
    """Names from the lowest end to the highest, in one column with room for each."""
    points = 72 / axes.figure.dpi  # per pixel
    heights: list[float] = []
    for _, up, *_ in ends:
        heights.append(max(up, heights[-1] + 13 / points) if heights else up)
    shift = sum(heights) / len(heights) - sum(end[1] for end in ends) / len(ends)
    right = max(end[0] for end in ends)
    for height, (across, up, place, label) in zip(heights, ends, strict=True):
        axes.annotate(
            label,
            place,
            ((right - across) * points + 8, (height - shift - up) * points),
            textcoords="offset points",
            color=colour(label),
            va="center",
            annotation_clip=False,
        )


@_styled
def heat(values: Any, labels: Sequence[str], xlabel: str, title: str = "") -> Figure:
    """A map of `values` [rows, columns] from 0 to 1, a labelled row each; of many columns, the
    largest of every few is shown."""
    most = 480
    rows, columns = values.shape
    every = -(-columns // most)
    padded = np.zeros((rows, -(-columns // every) * every), np.float32)
    padded[:, :columns] = values
    shown = padded.reshape(rows, -1, every).max(axis=2)
    figure, axes = _new(8.4, 1.3 + 0.17 * min(rows, 40))
    image = axes.imshow(
        shown,
        aspect="auto",
        interpolation="nearest",
        cmap="YlOrBr",
        vmin=0,
        vmax=max(1e-6, float(values.max())),
        extent=(0, shown.shape[1] * every, rows - 0.5, -0.5),
    )
    axes.grid(False)
    step = -(-rows // 40)
    axes.set_yticks(range(0, rows, step), list(labels)[::step], fontsize=7)
    axes.set_xlim(0, columns)
    axes.set_xlabel(xlabel)
    axes.set_title(title)
    figure.colorbar(image, ax=axes, fraction=0.025, pad=0.01)
    return figure
