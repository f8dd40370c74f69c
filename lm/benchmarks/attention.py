# SPDX-License-Identifier: Apache-2.0
"""Our attention beside every alternative on the machine: one process, the same arrays, rounds
interleaved.

Each round takes a sample (`timing`) of every contender, so that a change of clocks meets all of
them; medians are compared.
"""

import dataclasses
import functools
import gc
import importlib.metadata
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm.benchmarks import attention_alternatives as alternatives
from lm.benchmarks import loops, masks, timing
from lm.benchmarks.attention_problem import (
    Prepared,
    Problem,
    attempt,
    parse_heads,
    prepare_jax,
)
from lm.benchmarks.timing import Stopwatch
from lm.errors import UserError
from ops import _masked_attention_mosaic as mosaic
from ops import _masked_attention_triton as triton
from ops import _masked_attention_xla as xla
from ops import block_table, dispatch
from ops.masked_attention import masked_attention
from ops.visibility import Visibility
from pallas_kernels import triton_call


def _capability() -> int:
    try:
        return triton_call.capability()
    except triton_call.Missing:
        return 90


# What each of ours computes from (visibility, q, k) before its forward kernel starts.
BLOCK_LISTS: Mapping[str, Callable[..., Any]] = {
    "mosaic_gpu": lambda visibility, q, k: mosaic._query_tiles(
        visibility, q, k, mosaic.configs.plan(q.shape[3]).forward.units
    ),
    "triton": lambda visibility, q, k: triton._lists(
        triton._table(
            visibility,
            q,
            triton.configs.config("forward", _capability(), q.shape[3], q.dtype),
        )
    ),
    "xla": lambda visibility, q, k: block_table.key_blocks(
        visibility.block_table(
            q.shape[1], *dataclasses.astuple(xla.block_sizes(q.shape[2], q.shape[1], k.shape[1]))
        )
    ),
}

PASSES = ("forward", "forward_backward")
_COMPARED_ROWS = 512
_LIST_TURNS = 200


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure; contenders are ours (`dispatch.IMPLEMENTATIONS`) and `ALTERNATIVES`."""

    cases: Sequence[str] = tuple(masks.CASES)
    lengths: Sequence[int] = (8192, 32768, 131072)
    heads: Sequence[str] = ("32x8x128", "16x16x64")
    contenders: Sequence[str] = ("mosaic_gpu", "triton", "xla", *alternatives.ALTERNATIVES)
    passes: Sequence[str] = PASSES
    dtype: str = "bfloat16"
    batch: int = 1
    repeats: int = 20
    seconds: float = 2.0  # of samples per contender

    def check(self) -> None:
        """Raises UserError for a name that does not exist."""
        known = {
            "mask": (self.cases, tuple(masks.CASES)),
            "contender": (self.contenders, (*dispatch.IMPLEMENTATIONS, *alternatives.ALTERNATIVES)),
            "pass": (self.passes, PASSES),
            "type": ((self.dtype,), ("bfloat16", "float16", "float32")),
        }
        for what, (asked, valid) in known.items():
            for name in asked:
                if name not in valid:
                    raise UserError(f"{what} {name!r} is not one of {', '.join(valid)}")
        for heads in self.heads:
            parse_heads(heads)


class _Entry:
    """A contender that serves."""

    def __init__(self, name: str, prepared: Prepared):
        self.name, self.prepared = name, prepared
        self.watch = Stopwatch(prepared.run, prepared.wait)
        self.difference = 0.0  # from the first contender's results


def measure(plan: Plan) -> Iterator[dict[str, Any]]:
    """Rows, one per mask, length, heads, pass and contender; what cannot serve says why."""
    plan.check()
    for heads, length in itertools.product(plan.heads, plan.lengths):
        for name in plan.cases:
            case = masks.case(name, length, plan.batch)
            yield from _case(plan, Problem.make(case, parse_heads(heads), plan.dtype))
            gc.collect()  # of arrays that only cycles hold
        alternatives.release()


def _case(plan: Plan, problem: Problem) -> Iterator[dict[str, Any]]:
    case, length = problem.case, problem.q.shape[1]
    for passed in plan.passes:
        about = {
            "case": case.name,
            "length": length,
            "heads": str(problem.heads),
            "batch": plan.batch,
            "dtype": plan.dtype,
            "pass": passed,
            "pairs": case.pairs,
            "visible": case.pairs / (plan.batch * length * (length + 1) / 2),
        }
        for row in _one(plan, problem, passed == "forward_backward"):
            if passed == "forward" and "ms" in row and row["implementation"] in BLOCK_LISTS:
                lists = 1e3 * block_list_seconds(row["implementation"], problem)
                row |= {"lists_ms": lists, "lists_share": lists / row["ms"]}
            yield about | row


def ours() -> tuple[str, ...]:
    return dispatch.IMPLEMENTATIONS


def _one(plan: Plan, problem: Problem, backward: bool) -> Iterator[dict[str, Any]]:
    entries, refused = [], []
    for name in plan.contenders:
        prepared = attempt(name, functools.partial(_prepare, name, problem, backward))
        if isinstance(prepared, Prepared):
            entries.append(_Entry(name, prepared))
        else:
            refused.append(prepared)
    _compare(entries, problem)
    timing.rounds([entry.watch for entry in entries], plan.repeats, plan.seconds)
    yield from (_row(entry, problem.flops(backward)) for entry in entries)
    yield from refused


def _prepare(name: str, problem: Problem, backward: bool) -> Prepared:
    if name in alternatives.ALTERNATIVES:
        return alternatives.ALTERNATIVES[name](problem, backward)
    arrays = (problem.q, problem.k, problem.v, problem.d_out)
    attend = functools.partial(masked_attention, implementation=name)
    return prepare_jax(attend, arrays, (problem.case.visibility,), backward, name=name)


def _compare(entries: Sequence[_Entry], problem: Problem) -> None:
    """How far each is from the first, over some rows: a fast contender must compute the same."""
    length = problem.q.shape[1]
    rows = np.unique(np.linspace(0, length - 1, _COMPARED_ROWS).astype(int))
    first = None
    for entry in entries:
        results = entry.prepared.wait(entry.prepared.run())
        got = [entry.prepared.to_numpy(result, rows) for result in results]
        first = got if first is None else first
        same = [(a, b) for a, b in zip(got, first, strict=True) if a.shape == b.shape]
        entry.difference = max(alternatives.difference(a, b) for a, b in same)


def _row(entry: _Entry, flops: float) -> dict[str, Any]:
    row = {
        "implementation": entry.name,
        **entry.watch.summary(),
        "tflops": flops / entry.watch.median / 1e12,
        "temp_bytes": entry.prepared.temp_bytes,
        "difference": entry.difference,
        **entry.prepared.measured,
    }
    return row | ({"notes": entry.prepared.notes} if entry.prepared.notes else {})


def block_list_seconds(name: str, problem: Problem) -> float:
    """Seconds that finding its blocks adds to a longer program: turns of a loop that does, over
    turns of one that only reads the vectors."""
    q, k = problem.q, problem.k

    def lists(vectors, _):
        return BLOCK_LISTS[name](Visibility(**vectors), q, k)

    vectors = {
        field.name: value
        for field in dataclasses.fields(Visibility)
        if (value := getattr(problem.case.visibility, field.name)) is not None
    }
    watches = [
        loops.watch(loops.lower(stage, vectors, (), _LIST_TURNS).compile(), vectors, ())
        for stage in (lists, lambda vectors, _: vectors)
    ]
    timing.rounds(watches, 7, 1.0)
    found, nothing = (watch.median / _LIST_TURNS for watch in watches)
    return found - nothing


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Per mask, length, heads and pass the rate of each of ours over each alternative's, and over
    the best that cuDNN did on the plain causal mask of that length (`cudnn_causal`)."""
    rates: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if "tflops" in row:
            key = (row["case"], row["length"], row["heads"], row["pass"])
            rates.setdefault(key, {})[row["implementation"]] = row["tflops"]
    out = {}
    for (case, *rest), measured in rates.items():
        others = {name: rate for name, rate in measured.items() if name not in ours()}
        dense = rates.get(("causal", *rest), {})
        cudnn = [dense[name] for name in ("torch_cudnn", "jax_cudnn") if name in dense]
        if cudnn:
            others["cudnn_causal"] = max(cudnn)
        found = {
            f"{mine}/{other}": measured[mine] / rate
            for mine in measured
            if mine in ours()
            for other, rate in others.items()
        }
        out[" ".join(map(str, (case, *rest)))] = found
    return {key: found for key, found in out.items() if found}


def versions() -> dict[str, str]:
    """Of what was measured, and where."""
    found = {"device": jax.devices()[0].device_kind}
    for package in ("jax", "jaxlib", "torch", "triton", "jax-triton", "nvidia-cudnn-cu13"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
