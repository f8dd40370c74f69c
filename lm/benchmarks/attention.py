# SPDX-License-Identifier: Apache-2.0
"""Our attention beside every alternative on the machine: one process, the same arrays, rounds
interleaved.

A sample is several calls in a row, so many that it lasts 20 ms, waited for at the end: starting a
call is hidden behind the call before. Each round takes a sample of every contender, so that a
change of clocks meets all of them; medians are compared.
"""

import dataclasses
import functools
import gc
import importlib.metadata
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.benchmarks import attention_alternatives as alternatives
from lm.benchmarks import masks
from lm.benchmarks.attention_problem import Prepared, Problem, parse_heads, prepare_jax
from lm.errors import UserError
from ops import block_table, dispatch
from ops.masked_attention import masked_attention
from ops.visibility import Visibility

PASSES = ("forward", "forward_backward")
_SAMPLE_SECONDS = 0.02
_FEWEST = 3  # samples, however long they take
_COMPARED_ROWS = 512


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
    table_blocks: tuple[int, int] = (128, 128)

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


@dataclasses.dataclass
class _Entry:
    """A contender that serves, and its samples: seconds per call."""

    name: str
    prepared: Prepared
    calls: int = 1
    samples: list[float] = dataclasses.field(default_factory=list)
    started: list[float] = dataclasses.field(default_factory=list)  # seconds to start a call
    difference: float = 0.0  # from the first contender's results


def measure(plan: Plan) -> Iterator[dict[str, Any]]:
    """Rows, one per mask, length, heads, pass and contender; what cannot serve says why."""
    plan.check()
    for heads, length, name in itertools.product(plan.heads, plan.lengths, plan.cases):
        case = masks.case(name, length, plan.batch)
        problem = Problem.make(case, parse_heads(heads), plan.dtype)
        table_ms = 1e3 * block_list_seconds(case.visibility, length, *plan.table_blocks)
        for passed in plan.passes:
            about = {
                "case": name,
                "length": length,
                "heads": heads,
                "batch": plan.batch,
                "dtype": plan.dtype,
                "pass": passed,
                "pairs": case.pairs,
                "visible": case.pairs / (plan.batch * length * (length + 1) / 2),
            }
            for row in _one(plan, problem, passed == "forward_backward"):
                row = about | row
                if passed == "forward" and "ms" in row and row["implementation"] in ours():
                    row |= {"table_ms": table_ms, "table_share": table_ms / row["ms"]}
                yield row
        del problem
        alternatives.release()
        gc.collect()


def ours() -> tuple[str, ...]:
    return dispatch.IMPLEMENTATIONS


def _one(plan: Plan, problem: Problem, backward: bool) -> Iterator[dict[str, Any]]:
    entries, refused = [], []
    for name in plan.contenders:
        try:
            entries.append(_Entry(name, _prepare(name, problem, backward)))
        except dispatch.Unsupported as refusal:
            refused.append({"implementation": name, "refused": str(refusal)})
        except Exception as error:
            key = "failed" if name in ours() else "refused"
            lines = str(error).strip().splitlines() or [""]
            refused.append(
                {"implementation": name, key: f"{type(error).__name__}: {lines[0][:200]}"}
            )
    _compare(entries, problem)
    for entry in entries:
        _calibrate(entry)
    for _ in range(plan.repeats):
        for entry in entries:
            spent = sum(entry.samples) * entry.calls
            if len(entry.samples) < _FEWEST or spent < plan.seconds:
                _sample(entry)
    yield from (_row(entry, problem.flops(backward)) for entry in entries)
    yield from refused


def _prepare(name: str, problem: Problem, backward: bool) -> Prepared:
    if name in alternatives.ALTERNATIVES:
        return alternatives.ALTERNATIVES[name](problem, backward)
    arrays = (problem.q, problem.k, problem.v, problem.d_out)
    attend = functools.partial(masked_attention, implementation=name)
    return prepare_jax(attend, arrays, (problem.case.visibility,), backward)


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


def _calibrate(entry: _Entry) -> None:
    """Warms up, and finds how many calls make a sample."""
    for _ in range(3):
        began = time.perf_counter()
        result = None
        for _ in range(entry.calls):
            result = entry.prepared.run()
        entry.prepared.wait(result)
        seconds = (time.perf_counter() - began) / entry.calls
        entry.calls = min(max(int(_SAMPLE_SECONDS / seconds) + 1, 1), 2000)


def _sample(entry: _Entry) -> None:
    began = time.perf_counter()
    result = None
    for _ in range(entry.calls):
        result = entry.prepared.run()
    started = time.perf_counter()
    entry.prepared.wait(result)
    entry.samples.append((time.perf_counter() - began) / entry.calls)
    entry.started.append((started - began) / entry.calls)


def _row(entry: _Entry, flops: float) -> dict[str, Any]:
    median = statistics.median(entry.samples)
    low, _, high = statistics.quantiles(entry.samples, n=4)
    row = {
        "implementation": entry.name,
        "ms": 1e3 * median,
        "ms_p25": 1e3 * low,
        "ms_p75": 1e3 * high,
        "tflops": flops / median / 1e12,
        "start_ms": 1e3 * statistics.median(entry.started),
        "samples": len(entry.samples),
        "calls": entry.calls,
        "temp_bytes": entry.prepared.temp_bytes,
        "difference": entry.difference,
        **entry.prepared.measured,
    }
    return row | ({"notes": entry.prepared.notes} if entry.prepared.notes else {})


def block_list_seconds(visibility: Visibility, num_rows: int, block_q: int, block_k: int) -> float:
    """Seconds to find the blocks that a forward pass visits, as a part of a longer program."""
    repeats = 50

    @jax.jit
    def program(visibility):
        def again(step, total):
            # not a constant of the loop, which the compiler would take out of it
            moved = dataclasses.replace(visibility, until=visibility.until + step // repeats)
            found = block_table.key_blocks(moved.block_table(num_rows, block_q, block_k))
            return total + sum(jnp.sum(x, dtype=jnp.int32) for x in found)

        return jax.lax.fori_loop(0, repeats, again, jnp.int32(0))

    def once() -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(visibility))
        return (time.perf_counter() - began) / repeats

    once()
    return statistics.median(once() for _ in range(5))


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
