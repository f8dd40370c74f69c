# SPDX-License-Identifier: Apache-2.0
"""What contenders in the attention benchmark are given, and what they hand back to be timed."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.benchmarks.masks import Case
from lm.errors import UserError
from ops import dispatch


@dataclasses.dataclass(frozen=True)
class Heads:
    """N query heads on K key and value heads of H dimensions."""

    N: int
    K: int
    H: int

    def __str__(self) -> str:
        return f"{self.N}x{self.K}x{self.H}"


def parse_heads(text: str) -> Heads:
    """`NxKxH`, such as 32x8x128. Raises UserError."""
    try:
        N, K, H = map(int, text.split("x"))
    except ValueError:
        raise UserError(f"heads {text!r} are not NxKxH, such as 32x8x128") from None
    if min(N, K, H) < 1 or N % K:
        raise UserError(f"heads {text!r}: {K} key and value heads do not divide {N}")
    return Heads(N, K, H)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Random arrays under a mask, and a cotangent of the output; all contenders get these."""

    case: Case
    heads: Heads
    q: jax.Array  # [B, T, N, H]
    k: jax.Array  # [B, T, K, H]
    v: jax.Array  # [B, T, K, H]
    d_out: jax.Array  # [B, T, N, H]

    @classmethod
    def make(cls, case: Case, heads: Heads, dtype: str, seed: int = 0) -> "Problem":
        batch, length = case.visibility.until.shape
        keys = jax.random.split(jax.random.key(seed), 4)
        shapes = [(batch, length, number, heads.H) for number in (heads.N, heads.K) * 2]
        drawn = [
            jax.random.normal(key, shape, jnp.dtype(dtype))
            for key, shape in zip(keys, shapes, strict=True)
        ]
        q, k, d_out, v = drawn
        return cls(case, heads, q, k, v, d_out)

    def flops(self, backward: bool) -> float:
        """Of the products on visible pairs: two forward, five more backward."""
        forward = 4.0 * self.heads.N * self.heads.H * self.case.pairs
        return 3.5 * forward if backward else forward


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A compiled contender. `run` starts one call and returns (out,) or (out, dq, dk, dv), each
    [B, T, heads, H]; `wait` returns when a call and all before it are done."""

    run: Callable[[], Sequence[Any]]
    wait: Callable[[Sequence[Any]], Any]
    temp_bytes: int  # device memory beside arguments and results
    to_numpy: Callable[[Any, np.ndarray], np.ndarray]  # (result, rows): those rows in float32
    notes: str = ""
    measured: dict[str, float] = dataclasses.field(default_factory=dict)


def attempt(name: str, prepare: Callable[[], Prepared]) -> Prepared | dict[str, str]:
    """What `prepare` makes, or a row that says why there is nothing: "refused" by what cannot serve
    and by others' libraries whatever they raise, "failed" by ours."""
    try:
        return prepare()
    except dispatch.Unsupported as refusal:
        return {"implementation": name, "refused": str(refusal)}
    except Exception as error:
        key = "failed" if name in dispatch.IMPLEMENTATIONS else "refused"
        lines = str(error).strip().splitlines() or [""]
        return {"implementation": name, key: f"{type(error).__name__}: {lines[0][:200]}"}


Attend = Callable[..., jax.Array]  # (q, k, v, *extra) -> out

_programs: dict[tuple, jax.stages.Compiled] = {}


def prepare_jax(
    attend: Attend,
    arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    extra: tuple[Any, ...],
    backward: bool,
    notes: str = "",
    name: str | None = None,
) -> Prepared:
    """Compiles `attend(q, k, v, *extra)`, and its gradients for a cotangent when `backward`; with a
    name, once for all masks of the same shapes and fields."""
    q, k, v, d_out = arrays

    def forward(q, k, v, extra):
        return (attend(q, k, v, *extra),)

    def forward_backward(q, k, v, d_out, extra):
        out, pullback = jax.vjp(lambda *qkv: attend(*qkv, *extra), q, k, v)
        return out, *pullback(d_out)

    given = (q, k, v, d_out, extra) if backward else (q, k, v, extra)
    leaves, structure = jax.tree.flatten(given)
    key = (name, structure, tuple((x.shape, x.dtype.name) for x in leaves))
    compiled = _programs.get(key) if name else None
    if compiled is None:
        compiled = jax.jit(forward_backward if backward else forward).lower(*given).compile()
    if name:
        _programs[key] = compiled
    return Prepared(
        functools.partial(compiled, *given),
        jax.block_until_ready,
        int(compiled.memory_analysis().temp_size_in_bytes),
        lambda result, rows: np.asarray(result[:, rows].astype(jnp.float32)),
        notes,
    )


def repeat_heads(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """k and v with a copy for every query head, for kernels without grouped heads."""
    group = problem.heads.N // problem.heads.K
    return jnp.repeat(problem.k, group, axis=2), jnp.repeat(problem.v, group, axis=2)
