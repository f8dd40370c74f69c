# SPDX-License-Identifier: Apache-2.0
"""Vertical-slash attention beside dense causal attention: one process, the same arrays, rounds
interleaved.

Columns are drawn evenly from the prompt, other ones for every KV head. Before anything is timed,
some rows of each sparse contender are compared with the op's reference.
"""

import dataclasses
import functools
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.benchmarks import attention_alternatives as alternatives
from lm.benchmarks import masks, timing
from lm.benchmarks.attention_check import TOLERANCES
from lm.benchmarks.attention_problem import Prepared, Problem, attempt, parse_heads, prepare_jax
from lm.benchmarks.timing import Stopwatch
from lm.config import require_positive
from lm.errors import UserError
from ops import dispatch
from ops import sparse_attention as op
from ops.masked_attention import masked_attention

SPARSE, DENSE = "sparse", "dense"
_OTHERS = tuple(alternatives.ALTERNATIVES)
_COMPARED_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure; a contender is sparse:NAME or dense:NAME of `dispatch.IMPLEMENTATIONS`, or
    one of `attention_alternatives.ALTERNATIVES`, which are dense."""

    lengths: Sequence[int] = (8192, 32768, 65536)
    contenders: Sequence[str] = (
        "sparse:mosaic_gpu",
        "sparse:triton",
        "sparse:xla",
        "dense:mosaic_gpu",
        "dense:triton",
        "jax_cudnn",
    )
    heads: str = "32x8x128"
    columns: int = 2048  # per KV head, at most as many as there are keys
    band: int = op.BAND
    dtype: str = "bfloat16"
    batch: int = 1
    repeats: int = 20
    seconds: float = 2.0  # of samples per contender

    def check(self) -> None:
        """Raises UserError for a name that does not exist."""
        parse_heads(self.heads)
        for length in self.lengths:
            require_positive("--lengths", length)
        if self.dtype not in TOLERANCES:
            raise UserError(f"type {self.dtype!r} is not one of {', '.join(TOLERANCES)}")
        ours = [f"{kind}:{name}" for kind in (SPARSE, DENSE) for name in dispatch.IMPLEMENTATIONS]
        for name in self.contenders:
            if name not in (*ours, *_OTHERS):
                known = ", ".join((*ours, *_OTHERS))
                raise UserError(f"contender {name!r} is not one of {known}")


@dataclasses.dataclass(frozen=True)
class Lists:
    """Ascending columns of every KV head."""

    columns: jax.Array  # [B, K, M] int32
    counts: jax.Array  # [B, K] int32
    band: int

    @classmethod
    def draw(cls, plan: Plan, problem: Problem) -> "Lists":
        B, S, K, _ = problem.k.shape
        rng = np.random.default_rng(0)
        number = min(plan.columns, S)
        drawn = [np.sort(rng.permutation(S)[:number]) for _ in range(B * K)]
        columns = jnp.asarray(np.reshape(drawn, (B, K, number)), jnp.int32)
        return cls(columns, jnp.full((B, K), number, jnp.int32), plan.band)

    def pairs(self, length: int) -> int:
        """Visible (row, key) pairs over the batch, of one query head a KV head."""
        row = np.arange(length, dtype=np.int64)
        start = np.maximum(row // op.BLOCK * op.BLOCK - self.band, 0)
        columns = np.asarray(self.columns, np.int64)
        first = op.BLOCK * ((columns + self.band) // op.BLOCK + 1)
        in_band = int((row + 1 - start).sum()) * columns.shape[0] * columns.shape[1]
        return in_band + int(np.maximum(length - first, 0).sum())

    def attend(self, q, k, v, columns, counts, *, implementation: str, **rows: Any) -> jax.Array:
        return op.sparse_attention(
            q, k, v, columns, counts=counts, band=self.band, implementation=implementation, **rows
        )


def measure(plan: Plan) -> Iterator[dict[str, Any]]:
    """Rows, one per length and contender; what cannot serve says why."""
    plan.check()
    for length in plan.lengths:
        case = masks.case("causal", length, plan.batch)
        problem = Problem.make(case, parse_heads(plan.heads), plan.dtype)
        yield from _length(plan, problem, Lists.draw(plan, problem))
        gc.collect()  # of arrays that only cycles hold
        alternatives.release()


def _length(plan: Plan, problem: Problem, lists: Lists) -> Iterator[dict[str, Any]]:
    heads, length = problem.heads, problem.q.shape[1]
    about = {"length": length, "heads": str(heads), "batch": plan.batch, "dtype": plan.dtype}
    pairs = {SPARSE: lists.pairs(length) / heads.K, DENSE: problem.case.pairs}
    entries, rows = [], []
    for contender in plan.contenders:
        kind, _, name = contender.rpartition(":")
        kind = kind or DENSE
        found = attempt(name, functools.partial(_prepare, kind, name, problem, lists))
        row = about | {"method": contender, "kind": kind}
        if not isinstance(found, Prepared):
            rows.append(row | found | {"implementation": name})
            continue
        row |= {"implementation": name, "pairs": pairs[kind], "temp_bytes": found.temp_bytes}
        if kind == SPARSE:
            row["difference"] = _difference(found, problem, lists)
            if row["difference"] > (most := TOLERANCES[plan.dtype]):
                row["failed"] = f"differs from the reference by {row['difference']:.2g}, not {most}"
        rows.append(row)
        entries.append((row, Stopwatch(found.run, found.wait)))
    timing.rounds([watch for _, watch in entries], plan.repeats, plan.seconds)
    for row, watch in entries:
        flops = 4.0 * heads.N * heads.H * row["pairs"]
        row |= watch.summary() | {"tflops": flops / watch.median / 1e12}
    yield from rows


def _prepare(kind: str, name: str, problem: Problem, lists: Lists) -> Prepared:
    arrays = (problem.q, problem.k, problem.v, problem.d_out)
    if kind == SPARSE:
        attend = functools.partial(lists.attend, implementation=name)
        return prepare_jax(attend, arrays, (lists.columns, lists.counts), False)
    if name in alternatives.ALTERNATIVES:
        return alternatives.ALTERNATIVES[name](problem, False)
    attend = functools.partial(masked_attention, implementation=name)
    return prepare_jax(attend, arrays, (problem.case.visibility,), False)


def _difference(prepared: Prepared, problem: Problem, lists: Lists) -> float:
    """From the reference, over some rows of which it keeps the scores of one at a time."""
    length = problem.q.shape[1]
    rows = np.unique(np.linspace(0, length - 1, _COMPARED_ROWS).astype(int))
    (out,) = prepared.wait(prepared.run())
    got = prepared.to_numpy(out, rows)
    one_row = jax.jit(functools.partial(lists.attend, implementation="reference"))
    fixed = (problem.k, problem.v, lists.columns, lists.counts)
    offsets = jnp.ones((problem.q.shape[0],), jnp.int32)
    with jax.default_matmul_precision("highest"):
        wanted = [
            one_row(problem.q[:, row : row + 1], *fixed, row_offset=int(row) * offsets)
            for row in rows
        ]
    wanted = np.concatenate([np.asarray(x.astype(jnp.float32)) for x in wanted], axis=1)
    return alternatives.difference(got, wanted)


def speedups(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Per length, the median time of each dense contender over that of each sparse one."""
    out: dict[str, dict[str, float]] = {}
    for mine in rows:
        for other in rows:
            if (
                "ms" in mine
                and "ms" in other
                and (mine["kind"], other["kind"]) == (SPARSE, DENSE)
                and mine["length"] == other["length"]
            ):
                found = out.setdefault(str(mine["length"]), {})
                found[f"{mine['method']}/{other['method']}"] = other["ms"] / mine["ms"]
    return out
