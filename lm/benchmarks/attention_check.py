# SPDX-License-Identifier: Apache-2.0
"""Implementations of `masked_attention` against the float32 reference under random masks.

Outputs, log-sum-exps and the gradients of both: how far they are off, whether what sees nothing is
exactly zero, whether everything is finite, and whether a second run gives the same bits. Masks
share a few shapes, so that a few compiled programs serve all of them.
"""

import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.benchmarks.random_masks import FAMILIES, random_visibility
from lm.errors import UserError
from ops.dispatch import IMPLEMENTATIONS, Unsupported
from ops.masked_attention import masked_attention
from ops.visibility import Visibility

TENSORS = ("out", "lse", "dq", "dk", "dv")
# max |difference| / max |reference| of each tensor
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
DTYPES = ("bfloat16", "float16", "float32")  # all masks in the first
_SHARE = 0.15  # of the masks in the others
_BATCH = 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """One compiled program, or two: with and without hidden runs unless `runs`."""

    T: int
    S: int
    N: int
    K: int
    H: int
    runs: bool

    def __str__(self) -> str:
        return f"{self.T}x{self.S}, {self.N}/{self.K} heads of {self.H}"


# Every head dim with every group size; square and chunked, with whole and ragged last blocks.
SHAPES = (
    Shape(1000, 1000, 8, 1, 128, True),
    Shape(1024, 1024, 8, 2, 128, False),
    Shape(300, 900, 4, 2, 128, True),
    Shape(777, 777, 2, 2, 128, False),
    Shape(900, 900, 8, 1, 64, False),
    Shape(256, 1024, 4, 1, 64, True),
    Shape(1000, 1000, 4, 2, 64, True),
    Shape(511, 1001, 2, 2, 64, False),
    Shape(200, 700, 8, 1, 256, True),
    Shape(640, 640, 4, 1, 256, False),
    Shape(700, 700, 4, 2, 256, True),
    Shape(513, 513, 2, 2, 256, True),
)
# The same idea where there is no time for more.
SMALL_SHAPES = (
    Shape(90, 90, 8, 1, 64, True),
    Shape(33, 96, 4, 2, 128, True),
    Shape(40, 40, 4, 1, 256, False),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A mask with arrays to attend under it, and cotangents of output and log-sum-exp."""

    seed: int
    family: str
    shape: Shape

    def arrays(self, dtype: str) -> tuple[jax.Array, ...]:
        """q, k, v, d_out in `dtype` and d_lse in float32, fresh for each seed."""
        at = self.shape
        query, key = (_BATCH, at.T, at.N, at.H), (_BATCH, at.S, at.K, at.H)
        rng = np.random.default_rng([self.seed, 1])
        drawn = [rng.standard_normal(s, np.float32) for s in (query, key, key, query, query[:3])]
        return *(jnp.asarray(x, dtype) for x in drawn[:4]), jnp.asarray(drawn[4])

    def mask(self) -> Visibility:
        at = self.shape
        return random_visibility(self.seed, self.family, _BATCH, at.T, at.S, at.runs)


def problems(count: int, seed: int = 0, shapes: Sequence[Shape] = SHAPES) -> list[Problem]:
    """`count` masks; every family meets every shape in turn."""
    return [
        Problem(
            seed + number,
            FAMILIES[(number // len(shapes) + number) % len(FAMILIES)],
            shapes[number % len(shapes)],
        )
        for number in range(count)
    ]


def _signature(implementation: str, precision: str | None, arguments: Any) -> tuple:
    leaves, structure = jax.tree.flatten(arguments)
    return implementation, precision, structure, tuple((x.shape, x.dtype.name) for x in leaves)


_programs: dict[tuple, Callable[..., Any]] = {}
_lowering = threading.Lock()  # Triton parses kernels in Python, one thread at a time


def _program(implementation: str, precision: str | None, arguments: Any) -> Callable[..., Any]:
    """The compiled outputs and gradients for arguments (q, k, v, d_out, d_lse), mask. Raises
    Unsupported."""

    def program(arrays, mask):
        q, k, v, d_out, d_lse = arrays

        def attend(q, k, v):
            return masked_attention(q, k, v, mask, return_lse=True, implementation=implementation)

        outputs, pullback = jax.vjp(attend, q, k, v)
        return dict(zip(TENSORS, (*outputs, *pullback((d_out, d_lse))), strict=True))

    key = _signature(implementation, precision, arguments)
    if key not in _programs:
        with jax.default_matmul_precision(precision), _lowering:
            lowered = jax.jit(program).lower(*arguments)
        _programs[key] = lowered.compile()
    return _programs[key]


def _run(implementation: str, precision: str | None, arguments: Any) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, _program(implementation, precision, arguments)(*arguments))


def _reference_arguments(arrays: tuple[jax.Array, ...], mask: Visibility) -> tuple[Any, Any]:
    """In float32, and with hidden vectors always: one program of the reference for all masks."""
    if mask.hidden_from is None:
        nothing = jnp.zeros_like(mask.until)
        mask = dataclasses.replace(mask, hidden_from=nothing, hidden_until=nothing)
    return tuple(x.astype(jnp.float32) for x in arrays), mask


def _precision(dtype: str) -> str | None:
    """XLA may compute float32 products in fewer bits, which is not what is compared here."""
    return "highest" if dtype == "float32" else None


def _compile_all(
    chosen: Sequence[Problem], dtype: str, implementations: Sequence[str], workers: int
) -> None:
    """Compiles what the problems need, several programs at a time."""
    jobs = {}
    for problem in {(p.shape, p.mask().hidden_from is None): p for p in chosen}.values():
        arguments = problem.arrays(dtype), problem.mask()
        for name in implementations:
            job = (name, _precision(dtype), arguments)
            jobs[_signature(*job)] = job
        job = ("reference", "highest", _reference_arguments(*arguments))
        jobs[_signature(*job)] = job

    def compile(job):
        with contextlib.suppress(Unsupported):  # said when it is asked for
            _program(*job)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(compile, jobs.values()))


def expected(problem: Problem, arrays: tuple[jax.Array, ...]) -> dict[str, np.ndarray]:
    """The reference on the same values in float32, with products in full float32."""
    return _run("reference", "highest", _reference_arguments(arrays, problem.mask()))


def check(problem: Problem, dtype: str, implementations: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row per implementation: the error of each tensor, and what else must hold."""
    arrays = problem.arrays(dtype)
    want = expected(problem, arrays)
    arguments = arrays, problem.mask()
    for implementation in implementations:
        row = {"implementation": implementation, "dtype": dtype, "family": problem.family}
        row |= {"seed": problem.seed, **dataclasses.asdict(problem.shape)}
        try:
            _poison(sum(x.nbytes for x in want.values()))
            got, again = (_run(implementation, _precision(dtype), arguments) for _ in range(2))
        except Unsupported as refusal:
            yield row | {"refused": str(refusal)}
            continue
        yield row | compare(got, want, dtype) | {"deterministic": _same_bits(got, again)}


def compare(
    got: dict[str, np.ndarray], want: dict[str, np.ndarray], dtype: str
) -> dict[str, float | bool]:
    """`error_*` of each tensor (infinite unless finite where the reference is), `exact_zeros` where
    nothing is seen, and `passed`."""
    blind = want["lse"] == -np.inf  # [B, T, N]
    unseen = (want["dv"] == 0).all(-1)  # [B, S, K]
    zeros = all(not got[name][blind].any() for name in ("out", "dq"))
    zeros &= all(not got[name][unseen].any() for name in ("dk", "dv"))
    zeros &= bool((got["lse"][blind] == -np.inf).all())
    errors = {f"error_{name}": _error(got[name], want[name]) for name in TENSORS}
    passed = zeros and max(errors.values()) <= TOLERANCES[dtype]
    return errors | {"exact_zeros": bool(zeros), "passed": bool(passed)}


def _error(got: np.ndarray, want: np.ndarray) -> float:
    finite = np.isfinite(want)
    got, want = np.asarray(got[finite], np.float64), np.asarray(want[finite], np.float64)
    if not np.isfinite(got).all():
        return float("inf")
    difference, largest = np.abs(got - want).max(initial=0), np.abs(want).max(initial=0)
    return float(difference / max(largest, 1e-3))


def _same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(a[name].tobytes() == b[name].tobytes() for name in TENSORS)


def _poison(size: int) -> None:
    """Leaves NaN in the memory that the next program is given: what it fails to write shows."""
    jax.block_until_ready(jnp.full(max(size // 4, 1), jnp.nan, jnp.float32))


def sweep(
    implementations: Sequence[str],
    dtypes: Sequence[str] = DTYPES,
    count: int = 200,
    seed: int = 0,
    shapes: Sequence[Shape] = SHAPES,
    workers: int = 4,
) -> Iterator[dict[str, Any]]:
    """Rows of `check`: `count` masks over all shapes in the first type, and a share of them over
    some shapes in the others. Raises UserError."""
    for name in implementations:
        if name not in IMPLEMENTATIONS:
            raise UserError(f"implementation {name!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    for dtype in dtypes:
        if dtype not in TOLERANCES:
            raise UserError(f"type {dtype!r} is not one of {', '.join(TOLERANCES)}")
    for dtype in dtypes:
        chosen = problems(count, seed, shapes)
        if dtype != dtypes[0]:
            chosen = problems(max(round(_SHARE * count), 1), seed, shapes[1::3])
        _compile_all(chosen, dtype, implementations, workers)
        for problem in chosen:
            yield from check(problem, dtype, implementations)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per implementation, type, head dim and family: how many masks, how many passed, the
    worst error of each tensor; refusals by name."""
    keys = ("implementation", "dtype", "H", "family")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    lines = []
    for values, members in groups.items():
        line = dict(zip(keys, values, strict=True)) | {"cases": len(members)}
        served = [row for row in members if "refused" not in row]
        line["served"] = len(served)
        if served:
            line["passed"] = sum(row["passed"] for row in served)
            for name in TENSORS:
                line[f"error_{name}"] = max(row[f"error_{name}"] for row in served)
            line["deterministic"] = all(row["deterministic"] for row in served)
            line["exact_zeros"] = all(row["exact_zeros"] for row in served)
        refused = sorted({row["refused"] for row in members if "refused" in row})
        if refused:
            line["refused"] = "; ".join(refused)
        lines.append(line)
    return lines


def failures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that served the call and broke something."""
    served = [row for row in rows if "refused" not in row]
    return [row for row in served if not (row["passed"] and row["deterministic"])]


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The summary as a table for docs/results."""
    errors = [f"error_{name}" for name in TENSORS]
    heading = ["implementation", "dtype", "H", "family", "cases", "passed", *TENSORS]
    out = [[*heading, "bit-equal", "zeros exact"], ["---"] * (len(heading) + 2)]
    for line in lines:
        first = [str(line[key]) for key in ("implementation", "dtype", "H", "family", "cases")]
        if not line["served"]:
            out.append([*first, f"refused: {line['refused']}", *["–"] * 7])
            continue
        worst = [f"{line[key]:.1e}" for key in errors]
        held = ["yes" if line[key] else "NO" for key in ("deterministic", "exact_zeros")]
        out.append([*first, f"{line['passed']}/{line['served']}", *worst, *held])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in out) + "\n"
