# SPDX-License-Identifier: Apache-2.0
"""Masks that the ops are tested under, and what they mean spelt out in loops."""

import math
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from ops.visibility import Visibility

MASKS = ("causal", "documents", "tree", "hidden", "blind", "random")


def visibility(name: str, batch: int, length: int, seed: int = 0) -> Visibility:
    """A mask of the named kind; every sequence has another one where that is possible.

    All vectors are present, so that one compiled program serves every kind.
    """
    vectors = _vectors(name, batch, length, np.random.default_rng(seed))
    none = np.zeros((batch, length))
    until, hidden_from, hidden_until = vectors if len(vectors) == 3 else (*vectors, none, none)
    vectors = (until, hidden_from, hidden_until, np.zeros(batch))
    return Visibility(*(jnp.asarray(np.asarray(x, np.int32)) for x in vectors))


# Every drawn shape is a compilation: a failing case is shown as drawn, without shrinking.
DRAW_ONLY = (hypothesis.Phase.explicit, hypothesis.Phase.generate)

# Programs of tests run once: compiling them fast matters more than how they run.
COMPILER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
jit = partial(jax.jit, compiler_options=COMPILER_OPTIONS)


def cpu_mesh(**axes: int) -> jax.sharding.Mesh:
    """A mesh of the CPU devices that conftest makes, also where the default backend is another."""
    devices = jax.devices("cpu")[: math.prod(axes.values())]
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)


def _vectors(name: str, batch: int, length: int, rng: np.random.Generator) -> tuple:
    keys = np.broadcast_to(np.arange(length), (batch, length))
    whole = np.full((batch, length), length)
    if name == "causal":
        return (whole,)
    if name == "documents":  # two of them, then padding
        first = rng.integers(1, length, (batch, 1))
        second = rng.integers(first, length + 1)
        return (np.where(keys < first, first, np.where(keys < second, second, 0)),)
    if name == "blind":  # the second half of each sequence, and all of the last one, see nothing
        until = np.where(keys < length // 2, length // 2, 0)
        until[-1] = 0
        return (until,)
    if name == "tree":
        return (np.stack([_tree(rng, length) for _ in range(batch)]),)
    if name == "random":
        return tuple(rng.integers(-2, length + 3, (batch, length)) for _ in range(3))
    assert name == "hidden"  # keys of a block are hidden from its end to a later row
    start, end = length // 4, length // 2
    inside = (keys >= start) & (keys < end)
    sync = rng.integers(end, length, (batch, 1))
    return whole, np.where(inside, end, length), np.where(inside, sync, 0)


def _tree(rng: np.random.Generator, length: int) -> np.ndarray:
    """Ends of the subtrees of a random tree laid out depth first."""
    until = np.empty(length, int)
    open_ends = [length]
    for node in range(length):
        while open_ends[-1] <= node:
            open_ends.pop()
        open_ends.append(int(rng.integers(node + 1, open_ends[-1] + 1)))
        until[node] = open_ends[-1]
    return until


def dense(mask: Visibility, num_rows: int) -> np.ndarray:
    """[B, T, S] bool, pair by pair from the definition."""
    hidden = mask.hidden_from is not None
    mask = jax.tree.map(np.asarray, mask)
    until = mask.until
    batch, length = until.shape
    offset = np.zeros(batch, int) if mask.row_offset is None else mask.row_offset
    out = np.zeros((batch, num_rows, length), bool)
    for b in range(batch):
        for t in range(num_rows):
            for j in range(length):
                i = offset[b] + t
                sees = j <= i and i < until[b, j]
                if hidden:
                    sees &= not (mask.hidden_from[b, j] <= i < mask.hidden_until[b, j])
                out[b, t, j] = sees
    return out


def arrays(seed: int, *shapes: tuple[int, ...], dtype="float32") -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    return [jnp.asarray(rng.standard_normal(shape, np.float32).astype(dtype)) for shape in shapes]


def attention_by_loops(q, k, v, mask, scale) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp, one row and head at a time, for a [B, T, S] mask."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    for b in range(B):
        for t in range(T):
            seen = np.flatnonzero(mask[b, t])
            for n in range(N) if len(seen) else ():
                scores = scale * k[b, seen, n // group] @ q[b, t, n]
                lse[b, t, n] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
                out[b, t, n] = np.exp(scores - lse[b, t, n]) @ v[b, seen, n // group]
    return out, lse
