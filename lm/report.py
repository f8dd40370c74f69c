# SPDX-License-Identifier: Apache-2.0
"""One self-contained page from the rows that runs leave in their workdirs.

Every figure and table is made again from the rows, nothing is measured here. What a workdir does
not hold is left out, with a line that says which command would add it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lm import page, plots, report_rows, tables
from lm.page import Code, Picture, Section, Text
from lm.report_rows import Row, Run
from lm.workdir import Workdir

_TITLES = {
    "evaluate": "Held-out conversations, by turn",
    "verify": "Against plain causal passes over the same samples",
    "acceptance": "Drafts of CP heads: expected tokens per trunk call, without a decoder",
    "stage": "Stages of one layer",
    "decode": "Decoding",
    "async": "Answers in threads: quality and speed over sequential decoding",
    "preference": "Greedy answers after each round of preference optimisation",
    "async_speed": "Given programs in threads beside their texts in a row",
    "long_context": "Answers from long contexts, by method and what a step reads",
    "comparison": "Methods against each other, on tasks that dense attention masters",
    "draft": "How good the draft is: where it looks and what it writes, beside the target",
    "request": "Whole requests: the draft, the first token, the last one",
}
_SHOWN = {  # columns of kinds whose rows hold more than fits a page
    "acceptance": (
        "method",
        "expected_tokens_per_call",
        "stderr",
        "tokens_per_call",
        "expected_accepted",
        "joint_nll",
        "head_parameters",
        "source",
        "trained_on",
    ),
    "async": (
        *("method", "lambda", "round", "quality", "speedup_critical_path", "speedup_wall"),
        *("realised", "consistency", "well_formed", "tokens", "n", "batch"),
    ),
    "preference": (
        *("method", "lambda", "round", "quality", "speedup_critical_path", "well_formed"),
        *("hypervolume", "n"),
    ),
    "async_speed": (
        *("method", "threads", "batch", "steps", "critical_path_speedup", "wall_speedup"),
        *("realised", "step_ms_p50", "step_ms_p95", "tokens_per_s", "peak_bytes", "answers"),
    ),
    "long_context": (
        "method",
        *("task", "length", "budget", "accuracy", "agreement", "to_dense"),
        *("tokens_read", "samples", "seed"),
    ),
    "comparison": (
        *("method", "against", "budget", "questions", "mean_difference", "ci95", "verdict"),
        "pairs",
    ),
    "draft": ("task", "length", "budget", "overlap", "chance", "rank_correlation", "agreement"),
    "request": (
        *("method", "context", "batch", "budget", "draft_ms", "ttft_ms", "total_ms"),
        *("decode_tokens_per_s", "requests_per_s", "agreement"),
        *("peak_bytes", "prefill_cache_bytes", "draft_bytes"),
    ),
}
_METRICS = ("step", "loss_per_token", "grad_norm", "step_ms", "tokens_per_s", "mfu")


@dataclasses.dataclass(frozen=True)
class Report:
    """A page, the figures on it as PNG by name, and how many rows it was made from."""

    html: str
    figures: Mapping[str, bytes]
    rows: int


def build(workdirs: Sequence[str | pathlib.Path]) -> Report:
    """The page about these workdirs. Raises UserError when one of them is no workdir."""
    runs = report_rows.gather(workdirs)
    figures = {name: plots.png(figure) for name, figure in draw(runs).items()}
    sections = [
        _summary(runs),
        _plan(runs, figures),
        _training(runs, figures),
        _quality(runs, figures),
        _speed(runs, figures),
        _pictures(runs, figures),
        *_setting(runs),
    ]
    names = ", ".join(path.resolve().name for path in _given(runs))
    shown = _without_empty(sections, hints=not all(run.decodes for run in runs))
    html = page.render(f"Skim: {names}", _subtitle(runs[0]), shown)
    return Report(html, figures, sum(run.num_rows for run in runs))


def _without_empty(sections: Sequence[Section | None], hints: bool) -> list[Section]:
    """Sections that show something. Hints name single-pass commands: not for other runs."""
    kept = []
    for section in sections:
        blocks = () if section is None else section.blocks
        if not hints:
            blocks = tuple(block for block in blocks if block.kind != "hint")
        if blocks:
            kept.append(dataclasses.replace(section, blocks=blocks))
    return kept


def write(workdirs: Sequence[str | pathlib.Path], folder: str | pathlib.Path = "") -> Report:
    """Builds the page and writes report.html into `folder`, by default the first workdir."""
    report = build(workdirs)
    Workdir(folder or workdirs[0]).write("report.html", report.html)
    return report


def save_figures(report: Report, folder: str | pathlib.Path) -> list[str]:
    """Writes every figure of the page as `folder`/plots/NAME.png; returns the paths."""
    plots_folder = pathlib.Path(folder) / "plots"
    plots_folder.mkdir(exist_ok=True)
    saved = []
    for name, png in report.figures.items():
        (plots_folder / f"{name}.png").write_bytes(png)
        saved.append(str(plots_folder / f"{name}.png"))
    return saved


def draw(runs: Sequence[Run]) -> dict[str, Figure]:
    """Every figure that the rows of these runs allow, by name."""
    found = {}
    trained = {run.label: run.metrics for run in runs if run.metrics}
    if trained:
        found["loss_by_step"] = plots.loss_by_step(trained)
        found["loss_by_time"] = plots.loss_by_time(trained)
    depths = report_rows.rows_of(runs, _depths)
    if depths:
        found["exact_match"] = plots.exact_match_by_depth(depths)
    plan = _first_plan(runs)
    if plan is not None:
        found["plan"] = plots.costs(plan["modes"])
    measured = [row for row in _benchmarks(runs) if row.get("step_ms") is not None]
    if measured:
        found["speed"] = plots.speed(measured)
    return found


def _benchmarks(runs: Sequence[Run]) -> list[Row]:
    return report_rows.rows_of(runs, lambda run: run.benchmarks)


def _depths(run: Run) -> list[Row]:
    rows = [row for row in run.evaluations if row.get("depth") is not None]
    return [row for row in rows if row.get("exact_match") is not None]


def _first_plan(runs: Sequence[Run]) -> Mapping[str, Any] | None:
    return next((run.plan for run in runs if run.plan is not None), None)


def _given(runs: Sequence[Run]) -> list[pathlib.Path]:
    """The workdirs that were asked for, without the runs inside a comparison."""
    inner = {run.path / row["method"].replace(":", "_") for run in runs for row in run.comparison}
    inner |= {run.path / name for run in runs for name in report_rows.PARTS}
    return [run.path for run in runs if run.path not in inner]


def _subtitle(run: Run) -> str:
    env = run.env
    device = f"{env.get('num_devices', '?')} × {env.get('device', 'unknown device')}"
    parts = [device, f"commit {env['commit']}" if env.get("commit") else "", env.get("date", "")]
    return " · ".join(filter(None, parts))


def _hint(text: str, command: str) -> Text:
    return Text(text, command, kind="hint")


def _command(run: Run, verb: str, rest: str = "") -> str:
    return f"python -m experiments.single_pass.{verb} --workdir={run.path}{rest}"


def _summary(runs: Sequence[Run]) -> Section | None:
    blocks: list[Any] = []
    for run in runs:
        if run.comparison:
            measured = compared(run)
            blocks.append(dataclasses.replace(tables.comparison(measured), title=f"{run.path}"))
            blocks += [Text(line) for line in verdict(measured)]
    if not blocks:
        blocks = [
            _hint(
                "No comparison: what the modes cost on this data, and what quality they reach.",
                _command(runs[0], "compare", "_compared --modes=tree,n_pass --config=..."),
            )
        ]
    return Section("What it saves, what it costs", tuple(blocks))


def compared(run: Run) -> dict[str, dict[str, Any]]:
    """Per method: what it cost by plan and by measurement, and what quality came out."""
    timed = {
        row["method"]: row["conversations_per_s"] for row in report_rows.latest(run.benchmarks)
    }
    out: dict[str, dict[str, Any]] = {}
    for row in report_rows.latest(run.comparison):
        method = row["method"]
        planned = ((run.plan or {}).get("modes") or {}).get(method) or {}
        out[method] = {**planned, **row, "conversations_per_s": timed.get(method)}
    return out


def verdict(measured: Mapping[str, Row]) -> list[str]:
    """The exact match of the first method against the last, with its interval, in a sentence."""
    names = list(measured)
    first, last = measured[names[0]], measured[names[-1]]
    shares = [row.get("exact_match") for row in (first, last)]
    counts = [row.get("n") for row in (first, last)]
    if None in shares or not all(counts) or first is last:
        return []
    low, high = plots.difference(shares[0], counts[0], shares[1], counts[1])
    how = "no difference beyond chance" if low <= 0 <= high else "a difference beyond chance"
    return [
        f"Exact match of {names[0]} minus {names[-1]}: {100 * low:+.1f} to {100 * high:+.1f} "
        f"points (95 % interval over {counts[0]} and {counts[1]} answers): {how}."
    ]


def _plan(runs: Sequence[Run], figures: Mapping[str, bytes]) -> Section:
    plan = _first_plan(runs)
    if plan is None:
        hint = "No plan: tokens, attention pairs and FLOPs of each mode on this data."
        return Section("Plan", (_hint(hint, _command(runs[0], "plan", " --config=...")),))
    rows = [{"method": mode, **row} for mode, row in plan["modes"].items() if row is not None]
    columns = (
        "method",
        "tokens",
        "pairs",
        "flops",
        "rows",
        "fill",
        "predicted_speedup",
        "padded_speedup",
    )
    blocks = [
        Text(
            f"{plan['conversations']:,} conversations, {plan['samples']:,} trained turns, packed "
            f"into rows of {plan['seq_len']:,} tokens. Counts alone: nothing was run."
        ),
        Picture("Cost of one epoch per mode", figures["plan"]),
        tables.table(rows, columns=columns),
    ]
    blocks += [
        Text(f"{mode} refuses this data: {why}") for mode, why in plan.get("refused", {}).items()
    ]
    return Section("Plan", tuple(blocks))


def _training(runs: Sequence[Run], figures: Mapping[str, bytes]) -> Section:
    trained = [run for run in runs if run.metrics]
    if not trained:
        hint = "No metrics.jsonl: nothing was trained here."
        return Section("Training", (_hint(hint, _command(runs[0], "train", " --config=...")),))
    rows = []
    for run in trained:
        last = {key: run.metrics[-1].get(key) for key in _METRICS}
        rows.append({"method": run.label, **last, "seconds": plots.elapsed(run.metrics)[-1]})
    return Section(
        "Training",
        (
            Picture("Loss against optimiser steps", figures["loss_by_step"]),
            Picture("Loss against time", figures["loss_by_time"]),
            tables.table(rows, "At the last step"),
        ),
    )


def _quality(runs: Sequence[Run], figures: Mapping[str, bytes]) -> Section:
    blocks: list[Any] = []
    if "exact_match" in figures:
        blocks.append(
            Picture("Exact match by turn, thoughts dropped from history", figures["exact_match"])
        )
    kinds = dict.fromkeys(row.get("kind", "evaluate") for run in runs for row in run.evaluations)
    for kind in kinds:
        rows = report_rows.rows_of(
            runs,
            lambda run, kind=kind: [
                row for row in run.evaluations if row.get("kind", "evaluate") == kind
            ],
        )
        title = _TITLES.get(kind, f"Rows of {kind}")
        blocks.append(tables.table(rows, title, _SHOWN.get(kind)))
    if not any(row.get("exact_match") is not None for run in runs for row in run.evaluations):
        hint = "No evaluation by generation."
        blocks.append(_hint(hint, _command(runs[0], "evaluate")))
    return Section("Quality", tuple(blocks))


def _speed(runs: Sequence[Run], figures: Mapping[str, bytes]) -> Section:
    rows = _benchmarks(runs)
    if not rows:
        hint = "No benchmark: step time and memory of the modes beside each other on this device."
        command = _command(runs[0], "benchmark", " --modes=tree,n_pass --config=...")
        return Section("Speed", (_hint(hint, command),))
    blocks: list[Any] = []
    if "speed" in figures:
        blocks.append(Picture("Medians of alternating steps", figures["speed"]))
    for kind in dict.fromkeys(row.get("kind", "") for row in rows):
        own = [row for row in rows if row.get("kind", "") == kind]
        blocks.append(tables.table(own, _TITLES.get(kind, ""), _SHOWN.get(kind)))
    return Section("Speed", tuple(blocks))


def _pictures(runs: Sequence[Run], figures: Mapping[str, bytes]) -> Section | None:
    """What other commands left in plots/, such as the picture of a mask."""
    blocks = []
    for run in runs:
        for path in sorted((run.path / "plots").glob("*.png")):
            if path.stem not in figures:
                blocks.append(
                    Picture(f"{run.path.name}: {path.stem}", path.read_bytes(), scale=0.45)
                )
    return Section("Pictures", tuple(blocks)) if blocks else None


def _setting(runs: Sequence[Run]) -> list[Section]:
    """Commands, environment and configuration of every run."""
    commands = dict.fromkeys(run.env["command"] for run in runs if run.env.get("command"))
    rebuild = "python -m experiments.report " + " ".join(str(path) for path in _given(runs))
    lines = "\n".join(f"$ {command}" for command in (*commands, rebuild))
    environment = [
        {"run": run.path.name, **run.env.get("packages", {}), **_plain(run.env)}
        for run in runs
        if run.env
    ]
    configs = [
        Code(json.dumps(run.config, indent=2), f"{run.path / 'config.json'}", folded=True)
        for run in runs
        if run.config
    ]
    return [
        Section("Commands", (Code(lines),)),
        Section("Environment", (_transposed(environment),)),
        Section("Configuration", tuple(configs)),
    ]


def _plain(env: Mapping[str, Any]) -> dict[str, Any]:
    skip = ("packages", "command")
    return {key: value for key, value in env.items() if key not in skip}


def _transposed(rows: Sequence[Row]) -> tables.Table:
    """A line per key, a column per run; columns that say the same become one."""
    runs: dict[str, list[str]] = {}
    for row in rows:
        content = json.dumps({k: v for k, v in row.items() if k not in ("run", "date")})
        runs.setdefault(content, []).append(row["run"])
    distinct = [next(row for row in rows if row["run"] == names[0]) for names in runs.values()]
    keys = dict.fromkeys(key for row in distinct for key in row if key != "run")
    cells = tuple(
        (key, *("–" if row.get(key) is None else str(row[key]) for row in distinct)) for key in keys
    )
    return tables.Table(("", *(", ".join(names) for names in runs.values())), cells)
