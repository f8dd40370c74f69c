# SPDX-License-Identifier: Apache-2.0
"""Token selection beside its alternatives, stage by stage: one process, the same cache.

Per mode and length: whether every implementation selects and attends as the reference does, then
the time of each stage, and of whole steps, as a share of what a copy reaches in the same run.
"""

import concurrent.futures
import dataclasses
import gc
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.benchmarks import loops, selection_others, selection_problem, selection_stages
from lm.benchmarks.attention_problem import parse_heads
from lm.benchmarks.selection_problem import MODES, Problem
from lm.benchmarks.timing import Stopwatch
from lm.errors import UserError
from lm.long_context.cache import SHADOWS
from lm.token_select.config import SelectConfig
from ops import dispatch

OURS = ("triton", "xla")
CONTENDERS = (*OURS, *selection_stages.PLAIN, *selection_others.OTHERS)
_ALIKE = 2e-2  # of attention in bfloat16, against the largest entry
_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure. Rates guess how long a turn lasts, for loops of about `loop_seconds`."""

    tokens: Sequence[int] = (32_768, 131_072, 524_288, 1_048_576)
    modes: Sequence[str] = MODES
    shadows: Sequence[str] = ("", "int8", "fp8")
    contenders: Sequence[str] = CONTENDERS
    heads: str = "32x8x128"
    dtype: str = "bfloat16"
    config: SelectConfig = dataclasses.field(default_factory=SelectConfig)
    repeats: int = 7
    loop_seconds: float = 0.02
    copied: int = 1 << 28  # float32 numbers that the copy reads and writes

    def check(self) -> None:
        """Raises UserError for a name that does not exist, or lengths without candidates."""
        known = {
            "mode": (self.modes, MODES),
            "shadow": (self.shadows, ("", *SHADOWS)),
            "contender": (self.contenders, CONTENDERS),
        }
        for what, (asked, valid) in known.items():
            for name in asked:
                if name not in valid:
                    raise UserError(f"{what} {name!r} is not one of {', '.join(map(repr, valid))}")
        parse_heads(self.heads)
        least = self.config.n_init + self.config.k + self.config.n_local
        for tokens in self.tokens:
            if tokens <= least:
                raise UserError(f"{tokens} tokens: selection of {least} needs more than those")


@dataclasses.dataclass
class _Entry:
    about: dict[str, Any]
    turns: int
    bytes: int
    watch: Stopwatch | None = None
    lowered: jax.stages.Lowered | None = None
    large: Any = None


def measure(plan: Plan) -> Iterator[dict[str, Any]]:
    """Rows as they come: "copy", then per mode and length "overlap" and timed stages."""
    plan.check()
    bandwidth, row = copy_bandwidth(plan)
    yield row
    for mode, tokens in itertools.product(plan.modes, plan.tokens):
        problem = selection_problem.make(
            mode, tokens, parse_heads(plan.heads), plan.config, plan.dtype
        )
        yield from _checked(plan, problem)
        yield from _timed(plan, problem, bandwidth)
        del problem
        gc.collect()


def copy_bandwidth(plan: Plan) -> tuple[float, dict[str, Any]]:
    """Bytes a second of reading and writing a large array, and its row."""
    small = {"one": jnp.ones(())}
    array = jnp.zeros(plan.copied, jnp.float32)
    turns = selection_others.turns(plan.loop_seconds, 8 * plan.copied / _rate())
    lowered, count = loops.copied(small, array, turns)
    stopwatch = loops.watch(lowered.compile(), small, array)
    stopwatch.calibrate()
    for _ in range(plan.repeats):
        stopwatch.sample()
    seconds = stopwatch.median / turns
    row = {"stage": "copy", "method": "xla", "ms": 1e3 * seconds, "bytes": count}
    return count / seconds, row | {"bandwidth": count / seconds, "bandwidth_share": 1.0}


def _rate() -> float:
    """Bytes a second, roughly."""
    return {"gpu": 2e12, "tpu": 5e11}.get(dispatch.current_platform(), 5e9)


def _checked(plan: Plan, problem: Problem) -> Iterator[dict[str, Any]]:
    """Overlap of every selection with the one of XLA by the true keys, and the difference of
    attention over the same list from XLA's."""
    exact = attended = None
    for name, shadow in itertools.product(
        ("xla", "triton"), ("", *sorted(set(plan.shadows) - {""}))
    ):
        if name not in plan.contenders and (name, shadow) != ("xla", ""):
            continue
        about = _about(problem, name, shadow) | {"stage": "overlap"}
        shadowed = problem.with_shadow(shadow)
        stages = selection_stages.ours(shadowed, name)
        try:
            given = problem.small, selection_problem.large(shadowed)
            slots, counts = jax.jit(stages["select"].run)(*given)
            chosen = set(np.asarray(slots[0])[: int(counts[0])].tolist())
            exact = chosen if exact is None else exact
            row = about | {"overlap": len(chosen & exact) / len(exact)}
            middle = problem.config.n_init + problem.config.n_local
            row["overlap_top"] = (len(chosen & exact) - middle) / (len(exact) - middle)
            if not shadow:
                out = np.asarray(jax.jit(stages["attend"].run)(*given).astype(jnp.float32))
                attended = out if attended is None else attended
                row["difference"] = float(np.abs(out - attended).max() / np.abs(attended).max())
                alike = row["difference"] < _ALIKE and row["overlap_top"] > 0.999
                row |= {} if alike else {"failed": "selects or attends to something else"}
            yield row
        except dispatch.Unsupported as refusal:
            yield about | {"refused": str(refusal)}
        except Exception as error:  # a contender that breaks must not take the others along
            yield about | {"failed": _line(error)}


def _about(problem: Problem, name: str, shadow: str = "") -> dict[str, Any]:
    return {"mode": problem.mode, "tokens": problem.tokens, "method": name, "shadow": shadow}


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _timed(plan: Plan, problem: Problem, bandwidth: float) -> Iterator[dict[str, Any]]:
    entries, out = [], []
    for name in plan.contenders:
        shadows = plan.shadows if name == plan.contenders[0] and name in OURS else ("",)
        for shadow in shadows:
            try:
                entries += _prepare(plan, problem, name, shadow)
            except dispatch.Unsupported as refusal:
                out.append(_about(problem, name, shadow) | {"refused": str(refusal)})
            except Exception as error:
                key = "failed" if name in OURS else "refused"
                out.append(_about(problem, name, shadow) | {key: _line(error)})
    out += _compile(problem, entries)
    ready = [entry for entry in entries if entry.watch is not None]
    for entry in ready:
        entry.watch.calibrate()
    for _ in range(plan.repeats):
        for entry in ready:
            entry.watch.sample()
    rows = [_row(entry, bandwidth) for entry in ready]
    yield from (*rows, *_votes(rows), *out)


def _prepare(plan: Plan, problem: Problem, name: str, shadow: str) -> list[_Entry]:
    """Traced, with Triton kernels compiled; XLA compiles later, several at a time."""
    if name in selection_others.OTHERS:
        found = []
        for stage, prepared in selection_others.OTHERS[name](problem).items():
            stopwatch = Stopwatch(prepared.run, prepared.wait)
            prepared.wait(prepared.run())
            about = _about(problem, name) | {"stage": stage}
            found.append(_Entry(about, 1, prepared.bytes, stopwatch))
        return found
    problem = problem.with_shadow(shadow)
    large = selection_problem.large(problem)
    if name in OURS:
        stages = selection_stages.ours(problem, name)
        large["scores"] = jax.random.exponential(jax.random.key(1), (1, problem.tokens))
    else:
        stages = selection_stages.PLAIN[name](problem)
    found = []
    for stage, timed in stages.items():
        guess = max(timed.bytes / _rate(), 2e-5)
        turns = selection_others.turns(plan.loop_seconds, guess)
        lowered = loops.lower(timed.run, problem.small, large, turns)
        about = _about(problem, name, shadow) | {"stage": stage}
        found.append(_Entry(about, turns, timed.bytes, lowered=lowered, large=large))
    return found


def _compile(problem: Problem, entries: Sequence[_Entry]) -> list[dict[str, Any]]:
    """Fills in the watches; returns rows of what does not compile."""
    failed = []
    waiting = [entry for entry in entries if entry.lowered is not None]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        compiling = [pool.submit(entry.lowered.compile) for entry in waiting]
    for entry, future in zip(waiting, compiling, strict=True):
        if error := future.exception():
            failed.append(entry.about | {"failed": _line(error)})
        else:
            entry.watch = loops.watch(future.result(), problem.small, entry.large)
    return failed


def _row(entry: _Entry, bandwidth: float) -> dict[str, Any]:
    samples = [seconds / entry.turns for seconds in entry.watch.samples]
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return entry.about | {
        "ms": 1e3 * median,
        "ms_p25": 1e3 * low,
        "ms_p75": 1e3 * high,
        "bytes": entry.bytes,
        "bandwidth_share": entry.bytes / median / bandwidth,
    }


def _votes(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What turning products into votes takes: importance less its first part."""
    keys = ("mode", "tokens", "method", "shadow")
    score = {tuple(r[key] for key in keys): r["ms"] for r in rows if r["stage"] == "score"}
    for row in rows:
        if row["stage"] == "importance":
            about = {key: row[key] for key in keys}
            yield about | {"stage": "vote", "ms": row["ms"] - score[tuple(about.values())]}
