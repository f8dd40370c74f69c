# SPDX-License-Identifier: Apache-2.0
"""Chunk sizes and kernel settings of `linear_log_prob`, all timed side by side on this device."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from lm.benchmarks import linear_log_prob as benchmark
from lm.benchmarks.attention_problem import Prepared
from lm.benchmarks.linear_log_prob_problem import Problem
from ops import _linear_log_prob_xla as xla
from pallas_kernels import linear_log_prob_triton_config as triton_configs

MEMORY_LIMIT = 2 << 30  # of temporaries, for the best that "fits"
_XLA_MIB = (512, 1024, 2048)
_TRITON_CHUNKS = ((512, 512), (1024, 256), (1024, 512), (1024, 1024), (2048, 512), (2048, 1024))
_TRITON_KERNELS = (
    (1024, 4, 1),
    (2048, 4, 1),
    (2048, 8, 1),
    (2048, 8, 3),
    (4096, 8, 1),
    (4096, 8, 3),
    (4096, 16, 1),
    (4096, 16, 3),
)
# Whether XLA may choose its own Triton products over cuBLAS is not the op's to say, but timed.
_CUBLAS_ONLY = {"xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Variant:
    implementation: str
    setting: Any = None  # None: the table's
    cublas_only: bool = False

    def __str__(self) -> str:
        setting = "table" if self.setting is None else self.setting
        return f"{self.implementation} {setting}" + (" cublas" if self.cublas_only else "")

    def use(self) -> contextlib.AbstractContextManager[Any]:
        if self.setting is None:
            return contextlib.nullcontext()
        if self.implementation == "xla":
            return xla.override(self.setting << 20)
        return triton_configs.override(self.setting)

    def prepare(self, problem: Problem) -> Prepared:
        options = _CUBLAS_ONLY if self.cublas_only else None
        with self.use():
            return benchmark.ours(self.implementation, problem, compiler_options=options)


def tune(plan: benchmark.Plan) -> Iterator[dict[str, Any]]:
    """Rows per form and variant. Chunks first, with the table's kernel settings; then kernel
    settings at the best chunks that fit `MEMORY_LIMIT`."""
    plan.check()
    names = [name for name in ("triton", "xla") if name in plan.contenders]
    for form in plan.forms:
        problem = plan.problem(form)
        variants = list(_chunks(names))
        rows = list(_timed(variants, problem, plan))
        yield from rows
        start = best(rows).get("triton")
        if start is not None:
            chosen = variants[[str(v) for v in variants].index(start["variant"])]
            yield from _timed(list(_kernels(chosen)), problem, plan)


def _chunks(names: Sequence[str]) -> Iterator[Variant]:
    """Also every table as it is, with cuBLAS's products alone."""
    table = triton_configs.config()
    for name in names:
        if name == "xla":
            yield from (Variant(name, mib) for mib in _XLA_MIB)
        else:
            for gradient, logit in _TRITON_CHUNKS:
                config = dataclasses.replace(table, gradient_mib=gradient, logit_mib=logit)
                yield Variant(name, config)
        yield Variant(name, cublas_only=True)


def _kernels(chosen: Variant) -> Iterator[Variant]:
    config = chosen.setting or triton_configs.config()
    for block, warps, stages in _TRITON_KERNELS:
        setting = dataclasses.replace(config, block=block, num_warps=warps, num_stages=stages)
        yield dataclasses.replace(chosen, setting=setting)


def _timed(
    variants: Sequence[Variant], problem: Problem, plan: benchmark.Plan
) -> Iterator[dict[str, Any]]:
    named = ((str(v), functools.partial(v.prepare, problem)) for v in variants)
    by_name = {str(v): v for v in variants}
    for row in benchmark.compete(named, problem, plan):
        variant = by_name[row.pop("implementation")]
        yield {
            "form": problem.form,
            "implementation": variant.implementation,
            "variant": str(variant),
            **row,
        }


def best(rows: Sequence[dict[str, Any]], fits: bool = True) -> dict[str, dict[str, Any]]:
    """The fastest row of each implementation; `fits`: within `MEMORY_LIMIT`."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "ms" not in row or not row["agrees"] or (fits and row["temp_bytes"] > MEMORY_LIMIT):
            continue
        name = row["implementation"]
        if name not in found or row["ms"] < found[name]["ms"]:
            found[name] = row
    return found
