# SPDX-License-Identifier: Apache-2.0
"""token_importance: the reference against loops, every implementation against the reference."""

from functools import cache, partial
from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest

from ops import _token_importance_xla
from ops.token_importance import GQA, HEADS, REDUCTIONS, token_importance
from tests.ops.op_cases import arrays, jit
from tests.ops.op_tolerances import assert_close

IMPLEMENTATIONS = ("xla",)  # those compared with the reference


def problem(B=3, W=3, S=11, N=4, K=2, H=5, dtype="float32"):
    """The sequences see a part of the cache, nothing, all of it; rows see more and more."""
    q, k = arrays(0, (B, W, N, H), (B, S, K, H), dtype=dtype)
    begin = np.array([2, 4, 0, 1])[:B]
    last = np.array([S - 2, 3, S, 2])[:B]
    end = last[:, None] - np.arange(W)[::-1]
    return {"q": q, "k": k, "begin": jnp.asarray(begin), "end": jnp.asarray(end)}


def by_loops(
    q,
    k,
    *,
    begin,
    end,
    k_scale=None,
    scale=None,
    normalize=True,
    row_weights=None,
    head_weights=None,
    reduce="sum",
    heads="all",
    gqa="grouped",
    return_lse=True,
):
    """What the op promises, one row, head and slot at a time, in float64."""
    q, k = (np.asarray(x).astype(np.float64) for x in (q, k))
    begin, end = np.asarray(begin), np.asarray(end)
    (B, W, N, H), (S, K) = q.shape, k.shape[1:3]
    if k_scale is not None:
        k = k * np.asarray(k_scale).astype(np.float64)[..., None]
    scale = H**-0.5 if scale is None else scale
    lse = np.full((B, W, N), -np.inf)
    gives = {}  # (sequence, group of heads, slot): what rows and heads give
    counted = np.zeros(B, int)
    for b, w in np.ndindex(B, W):
        seen = [j for j in range(S) if begin[b] <= j < end[b, w]]
        counted[b] += bool(seen)
        for n in range(N) if seen else ():
            read = n // (N // K) if gqa == "grouped" else n % K
            values = np.array([scale * q[b, w, n] @ k[b, j, read] for j in seen])
            lse[b, w, n] = np.log(np.exp(values - values.max()).sum()) + values.max()
            values = np.exp(values - lse[b, w, n]) if normalize else values
            values = values * (1 if row_weights is None else float(row_weights[b, w]))
            values = values * (1 if head_weights is None else float(head_weights[n]))
            group = {"all": 0, "kv": read, "query": n}[heads]
            for j, value in zip(seen, values, strict=True):
                gives.setdefault((b, group, j), []).append(value)
    groups = {"all": 1, "kv": K, "query": N}[heads]
    scores = np.full((B, groups, S), 0.0 if normalize else -np.inf)
    for (b, group, j), given in gives.items():
        scores[b, group, j] = max(given) if reduce == "max" else sum(given)
        if reduce == "mean":
            scores[b, group, j] /= counted[b] * (N // groups)
    return (scores[:, 0] if heads == "all" else scores), lse


def run(implementation, block, monkeypatch, arguments, **settings):
    """`arguments` are arrays; outputs are scores and log-sum-exp."""
    size = lambda rows, slots: min(block, slots)  # noqa: E731
    monkeypatch.setattr(_token_importance_xla, "block_size", size)
    return compiled(implementation, block, tuple(settings.items()))(arguments)


@cache
def compiled(implementation, block, settings):
    """`block` only separates the entries."""
    op = partial(token_importance, implementation=implementation, return_lse=True, **dict(settings))
    return jit(lambda arguments: op(**arguments))


WEIGHTS = {
    "row_weights": np.array([[0.5, -1.0, 2.0], [1.0, 1.0, 1.0], [0.0, 3.0, 1.0]], np.float32),
    "head_weights": np.array([1.0, -0.5, 0.0, 2.0], np.float32),
}
COMBINATIONS = [
    {"reduce": reduce, "heads": heads, "gqa": gqa, "normalize": normalize}
    for reduce, heads, gqa, normalize in product(REDUCTIONS, HEADS, GQA, (True, False))
]


@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_combination(settings, monkeypatch):
    """The reference and the XLA loops, with weights, against loops in numpy."""
    arguments = problem() | {name: jnp.asarray(x) for name, x in WEIGHTS.items()}
    expected = by_loops(**arguments, **settings)
    for implementation in ("reference", *IMPLEMENTATIONS):
        actual = run(implementation, 4, monkeypatch, arguments, **settings)
        assert_close(actual, expected, "float32")
