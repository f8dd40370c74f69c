# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the Triton kernels behind token selection, chosen by timing on the device at
hand."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lm.benchmarks import loops, selection_others, selection_problem, selection_stages
from lm.benchmarks import tune as search
from lm.benchmarks.attention_problem import parse_heads
from lm.benchmarks.selection import Plan
from lm.benchmarks.selection_problem import Problem
from lm.benchmarks.timing import Stopwatch
from lm.config import require_choice
from ops import _selection_triton
from pallas_kernels import selection_triton_config as configs

_WARPS, _STAGES = (2, 4, 8), (1, 2, 3, 4, 5, 6)
# kernel -> (mode, shadow, stage that runs it, settings)
KERNELS: dict[str, tuple[str, str, str, dict[str, tuple[int, ...]]]] = {
    "scan": (
        "decode", "", "score",
        {"block": (32, 64, 128, 256), "steps": (1, 2, 4, 8, 16), "heads": (1, 2, 4, 8),
         "num_warps": _WARPS, "num_stages": _STAGES},
    ),
    "scan int8": (
        "decode", "int8", "score",
        {"block": (64, 128, 256), "steps": (1, 2, 4, 8, 16), "heads": (1, 2, 4, 8),
         "num_warps": _WARPS, "num_stages": _STAGES},
    ),
    "vote": ("decode", "", "importance", {"block": (32, 64, 128), "num_warps": _WARPS}),
    # where the row is longer than its block, others run instead
    "one_program": (
        "decode", "", "top_k",
        {"block": (8192, 16384, 32768, 65536), "num_warps": (8, 16, 32)},
    ),
    "count": ("decode", "", "top_k", {"block": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)}),
    "attend": (
        "decode", "", "attend",
        {"block": (16, 32, 64, 128), "num_warps": _WARPS, "num_stages": _STAGES[:4]},
    ),
    "pool": (
        "decode", "", "full",
        {"block": (16, 32, 64, 128, 256), "num_warps": _WARPS, "num_stages": _STAGES},
    ),
    "chunk": (
        "chunk", "", "attend",
        {"block": (32, 64, 128), "rows": (64, 128, 256), "num_warps": (4, 8),
         "num_stages": _STAGES[:4]},
    ),
    "gather": ("chunk", "", "attend", {"block": (16, 32, 64, 128), "num_warps": _WARPS}),
}  # fmt: skip


@dataclasses.dataclass
class _Turns:
    """A stopwatch of whole loops that says seconds per turn."""

    watch: Stopwatch
    turns: int

    @property
    def samples(self) -> list[float]:
        return self.watch.samples

    @property
    def median(self) -> float:
        return self.watch.median / self.turns

    def sample(self) -> None:
        self.watch.sample()


def tune(plan: Plan, kernels: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Rows, one per kernel (of `KERNELS`, or those named), on the largest length of the plan.

    Raises UserError for a name that is not there, and Unsupported where Triton does not run.
    """
    for name in kernels:
        require_choice("--kernels", name, tuple(KERNELS))
    _selection_triton.capability()
    for name, (mode, shadow, stage, options) in KERNELS.items():
        if kernels and name not in kernels:
            continue
        if mode not in plan.modes or shadow not in plan.shadows:
            continue
        problem = selection_problem.make(
            mode, max(plan.tokens), parse_heads(plan.heads), plan.config, plan.dtype
        ).with_shadow(shadow)
        yield _tuned(plan, name, problem, stage, options)


def _tuned(
    plan: Plan, name: str, problem: Problem, stage: str, options: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    kernel = name.split()[0]
    codes = problem.buffers.codes
    keys = problem.buffers.k if codes is None else codes
    start = configs.config(
        kernel, _selection_triton.capability(), problem.heads.H, keys.dtype.itemsize
    )
    large = selection_problem.large(problem)
    large["scores"] = jax.random.exponential(jax.random.key(1), (1, problem.tokens))
    wanted = None

    def attempt(config):
        nonlocal wanted
        with configs.override(**{kernel: config}):
            make = selection_stages.full if stage == "full" else selection_stages.ours
            timed = make(problem, "triton")[stage]
            got = jax.jit(timed.run)(problem.small, large)
            got = [np.asarray(x, np.float32) for x in jax.tree.leaves(got)]
            turns = selection_others.turns(plan.loop_seconds, max(timed.bytes / 2e12, 2e-5))
            lowered = loops.lower(timed.run, problem.small, large, turns)
            stopwatch = loops.watch(lowered.compile(), problem.small, large)
        wanted = got if wanted is None else wanted
        for a, b in zip(got, wanted, strict=True):
            if not np.allclose(a, b, rtol=2e-2, atol=2e-2 * np.abs(b).max()):
                raise ValueError("computes something else")
        stopwatch.calibrate()
        return search.Trial(config, [_Turns(stopwatch, turns)])

    rejected: dict[str, str] = {}
    best, times = search.search(start, options, attempt, rejected)
    return {
        "kernel": name,
        "mode": problem.mode,
        "stage": stage,
        "tokens": problem.tokens,
        "heads": plan.heads,
        "entry": str(best),
        "best": dataclasses.asdict(best),
        "ms": 1e3 * times[str(best)],
        "table_ms": 1e3 * times[str(start)],
        "tried_ms": {config: 1e3 * seconds for config, seconds in times.items()},
        "rejected": rejected,
    }
