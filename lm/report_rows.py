# SPDX-License-Identifier: Apache-2.0
"""What workdirs hold for a report: their configs and rows, the latest of each setting."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.errors import UserError
from lm.workdir import Workdir

Row = Mapping[str, Any]
_FILES = (
    "config.json",
    "plan.json",
    "metrics.jsonl",
    "eval.jsonl",
    "compare.jsonl",
    "benchmark.jsonl",
)
PARTS = ("target", "draft")  # runs within a run, shown with it
_SETTING = (
    *("method", "depth", "key", "context", "batch", "lambda", "round", "threads", "prompt_tokens"),
    *("setting", "seed"),
)
_STAGE = ("stage", "by", "mode", "tokens", "shadow")


@dataclasses.dataclass(frozen=True)
class Run:
    """What one workdir holds, as it is: the config of an old run need not parse any more."""

    path: pathlib.Path
    label: str  # starts with the method
    config: Mapping[str, Any]
    env: Mapping[str, Any]
    metrics: tuple[Row, ...] = ()
    evaluations: tuple[Row, ...] = ()
    comparison: tuple[Row, ...] = ()
    benchmarks: tuple[Row, ...] = ()
    plan: Mapping[str, Any] | None = None

    @property
    def decodes(self) -> bool:
        """Whether the run is about decoding, not about modes of training."""
        return _decodes(self.config)

    @property
    def num_rows(self) -> int:
        parts = (self.metrics, self.evaluations, self.comparison, self.benchmarks)
        return sum(len(part) for part in parts)


def gather(workdirs: Sequence[str | pathlib.Path]) -> list[Run]:
    """Reads workdirs, and behind each one with a comparison the runs that were compared, behind one
    of a target and a draft both.

    Raises:
      UserError: no workdirs, or a path that is none.
    """
    if not workdirs:
        raise UserError("which workdir? give at least one")
    runs = []
    for path in dict.fromkeys(pathlib.Path(workdir) for workdir in workdirs):
        run = _read(path)
        runs.append(run)
        for method in dict.fromkeys(row["method"] for row in run.comparison):
            inner = path / method.replace(":", "_")
            if inner.is_dir():
                runs.append(_read(inner, method))
        parts = [path / name for name in PARTS]
        runs += [_read(part, part.name) for part in parts if (part / "metrics.jsonl").is_file()]
    return _labelled(runs)


def _read(path: pathlib.Path, method: str | None = None) -> Run:
    if not any((path / name).is_file() for name in _FILES):
        raise UserError(f"{path} is not a workdir: it holds none of {', '.join(_FILES)}")
    config = _json(path / "config.json") or {}
    workdir = Workdir(path)
    rows = {
        name: tuple(workdir.rows(f"{name}.jsonl"))
        for name in ("metrics", "eval", "compare", "benchmark")
    }
    return Run(
        path=path,
        label=method or _label(path, config),
        config=config,
        env=_json(path / "env.json") or {},
        metrics=rows["metrics"],
        evaluations=rows["eval"],
        comparison=rows["compare"],
        benchmarks=rows["benchmark"],
        plan=_json(path / "plan.json"),
    )


def _label(path: pathlib.Path, config: Mapping[str, Any]) -> str:
    return path.name if _decodes(config) else config.get("data", {}).get("mode", path.name)


def _decodes(config: Mapping[str, Any]) -> bool:
    return not config.keys().isdisjoint({"head", "select", "draft", "threads"})


def _json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except OSError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return value if isinstance(value, dict) else None


def _labelled(runs: Sequence[Run]) -> list[Run]:
    """Runs of the same method are told apart by their directory."""
    trained = [run.label for run in runs if run.metrics]
    return [
        dataclasses.replace(run, label=f"{run.label} ({run.path.name})")
        if run.metrics and trained.count(run.label) > 1
        else run
        for run in runs
    ]


def rows_of(runs: Sequence[Run], kind: Callable[[Run], Sequence[Row]]) -> list[Row]:
    """The latest rows of every run; a method that several have has the run's name with its own."""
    found = [(run, latest(kind(run))) for run in runs]
    methods = collections.Counter(
        method for _, rows in found for method in {row.get("method") for row in rows}
    )
    return [
        {**row, "method": f"{row['method']} ({run.path.name})"}
        if row.get("method") is not None and methods[row["method"]] > 1
        else row
        for run, rows in found
        for row in rows
    ]


def latest(rows: Sequence[Row] | Any) -> list[Row]:
    """The last row of each setting: a repeated measurement replaces the earlier one."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        keys = _STAGE if "stage" in row else _SETTING
        found[tuple(str(row.get(key)) for key in keys)] = row
    return list(found.values())
