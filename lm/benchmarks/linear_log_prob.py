# SPDX-License-Identifier: Apache-2.0
"""Our `linear_log_prob` beside every alternative on the machine: one process, the same arrays,
rounds interleaved."""

import dataclasses
import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm.benchmarks import attention_alternatives, timing
from lm.benchmarks.attention_problem import Prepared, attempt
from lm.benchmarks.linear_log_prob_alternatives import ALTERNATIVES
from lm.benchmarks.linear_log_prob_problem import FORMS, Problem, prepare
from lm.benchmarks.timing import Stopwatch
from lm.errors import UserError
from ops import dispatch
from ops.linear_log_prob import linear_log_prob

_COMPARED_ROWS = 512
CEILING = "products"
# max |difference| / max |value| of a result in 2-byte types that still counts as the same: others
# round logits of size 5 to 8 bits. Ours are compared with a reference by `linear_log_prob_check`.
_ALIKE = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-3}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure; contenders are ours (`dispatch.IMPLEMENTATIONS`) and `ALTERNATIVES`."""

    rows: int = 32768
    dim: int = 2048
    vocab: int = 128256
    dtype: str = "bfloat16"
    forms: Sequence[str] = tuple(FORMS)
    contenders: Sequence[str] = ("triton", "pallas_tpu", "xla", *ALTERNATIVES)
    repeats: int = 20
    seconds: float = 4.0  # of samples per contender

    def check(self) -> None:
        """Raises UserError for a name that does not exist or a size below 1."""
        known = {
            "form": (self.forms, tuple(FORMS)),
            "contender": (self.contenders, (*dispatch.IMPLEMENTATIONS, *ALTERNATIVES)),
            "type": ((self.dtype,), tuple(_ALIKE)),
        }
        for what, (asked, valid) in known.items():
            for name in asked:
                if name not in valid:
                    raise UserError(f"{what} {name!r} is not one of {', '.join(valid)}")
        for name in ("rows", "dim", "vocab"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    def problem(self, form: str) -> Problem:
        return Problem.make(form, self.rows, self.dim, self.vocab, self.dtype)


class Entry:
    """A contender that serves, and how far its value and gradients are from the first one's."""

    def __init__(self, name: str, prepared: Prepared):
        self.name, self.prepared = name, prepared
        self.watch = Stopwatch(prepared.run, prepared.wait)
        self.differences: dict[str, float] = {}


def measure(plan: Plan) -> Iterator[dict[str, Any]]:
    """Rows, one per form and contender; what cannot serve says why."""
    plan.check()
    for form in plan.forms:
        problem = plan.problem(form)
        prepared = ((name, functools.partial(_prepare, name, problem)) for name in plan.contenders)
        about = {"form": form, **_sizes(plan)}
        for row in compete(prepared, problem, plan):
            yield about | row
        gc.collect()  # of arrays that only cycles hold
        attention_alternatives.release()


def _sizes(plan: Plan) -> dict[str, Any]:
    return {"rows": plan.rows, "dim": plan.dim, "vocab": plan.vocab, "dtype": plan.dtype}


def compete(
    named: Iterator[tuple[str, Any]], problem: Problem, plan: Plan
) -> Iterator[dict[str, Any]]:
    """Prepares, compares and times contenders, given as (name, function that prepares)."""
    entries, refused = [], []
    for name, function in named:
        prepared = attempt(name, functools.partial(_prepare_and_run, function))
        if isinstance(prepared, Prepared):
            entries.append(Entry(name, prepared))
        else:
            refused.append(prepared)
    compare(entries, problem)
    timing.rounds([entry.watch for entry in entries], plan.repeats, plan.seconds)
    yield from (_row(entry, problem) for entry in entries)
    yield from refused


def _prepare_and_run(function: Callable[[], Prepared]) -> Prepared:
    """Runs it once, so that what needs more memory than there is ends here, by itself."""
    prepared = function()
    prepared.wait(prepared.run())
    return prepared


def ours(name: str, problem: Problem, **options: Any) -> Prepared:
    """Raises Unsupported with the implementation's reason."""
    call = functools.partial(linear_log_prob, implementation=name)
    return prepare(problem, call, lambda *arrays: call(*arrays)[0], **options)


def _prepare(name: str, problem: Problem) -> Prepared:
    return ALTERNATIVES[name](problem) if name in ALTERNATIVES else ours(name, problem)


def compare(entries: Sequence[Entry], problem: Problem) -> None:
    """Differences from the first contender over some rows: a fast one must compute the same."""
    largest = max(problem.x.shape[0], problem.w.shape[0])
    rows = np.unique(np.linspace(0, largest - 1, _COMPARED_ROWS).astype(int))
    names = ("value", *(f"d{name}" for name in problem.wanted))
    first = None
    for entry in entries:
        if entry.name == CEILING:
            continue
        results = entry.prepared.wait(entry.prepared.run())
        got = [entry.prepared.to_numpy(result, rows) for result in results]
        first = got if first is None else first
        entry.differences = {
            name: attention_alternatives.difference(a, b)
            for name, a, b in zip(names, got, first, strict=True)
        }


def _row(entry: Entry, problem: Problem) -> dict[str, Any]:
    row = {
        "implementation": entry.name,
        **entry.watch.summary(),
        "tflops": problem.flops / entry.watch.median / 1e12,
        "temp_bytes": entry.prepared.temp_bytes,
        **{f"difference_{name}": value for name, value in entry.differences.items()},
    }
    if entry.differences:
        row["agrees"] = max(entry.differences.values()) <= _ALIKE[problem.x.dtype.name]
    return row | ({"notes": entry.prepared.notes} if entry.prepared.notes else {})


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Per form: the share of the ceiling's rate that each of ours reaches ("xla/products"), and its
    time over each alternative's ("xla time/liger") and over the best of them."""
    out: dict[str, dict[str, float]] = {}
    measured = [row for row in rows if "ms" in row]
    for form, group in itertools.groupby(measured, key=lambda row: row["form"]):
        times = {row["implementation"]: row["ms"] for row in group}
        others = {n: t for n, t in times.items() if n in ALTERNATIVES and n != CEILING}
        if others:
            others["best"] = min(others.values())
        found = {}
        for name in times:
            if name not in dispatch.IMPLEMENTATIONS:
                continue
            if CEILING in times:
                found[f"{name}/{CEILING}"] = times[CEILING] / times[name]
            found |= {f"{name} time/{other}": times[name] / t for other, t in others.items()}
        out[form] = found
    return {form: found for form, found in out.items() if found}


def failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why ours cannot be trusted: what broke, and what computes something else."""
    said = [f"{row['implementation']}: {row['failed']}" for row in rows if "failed" in row]
    return said + [
        f"{row['implementation']}, {row['form']}: computes something else"
        for row in rows
        if row["implementation"] in dispatch.IMPLEMENTATIONS and row.get("agrees") is False
    ]
