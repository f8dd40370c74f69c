# SPDX-License-Identifier: Apache-2.0
"""Implementations of `linear_log_prob` against float64, on this machine's device.

float32 must reach 1e-5 in values and 1e-4 in gradients, of the largest entry. In 2-byte types
values reach the same 1e-5, since products accumulate and logits stay in float32; gradients are
products of rounded factors, so each entry has a bound of its own, with unit roundoff u (2^-8, half
the spacing of bfloat16 relative to the smaller end of a binade):

    |error of dx| <= 2 u (|d| |w|) + u |dx|,    |error of dw| <= 2 u (|d|^T |x|) + u |dw|

where d are the gradients of the logits, rounded once, and a factor of each row may be rounded into
the other operand; the last term rounds the result.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from ops.dispatch import IMPLEMENTATIONS, Unsupported
from ops.linear_log_prob import linear_log_prob

VALUE, GRADIENT = 1e-5, 1e-4
_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    dim: int
    vocab: int
    softcap: float | None = None
    valid_vocab: int | None = None
    scale: float = 1.0  # deviation of logits
    spike: bool = False  # a late column far above all others


CASES = (
    Case(300, 128, 5003, softcap=5.0, valid_vocab=4900),
    Case(640, 256, 32000),
    Case(257, 64, 9000, scale=12.0),
    Case(130, 128, 20000, spike=True),
)
# The same idea where there is no time for more.
SMALL_CASES = (
    Case(40, 16, 300, softcap=5.0, valid_vocab=290),
    Case(20, 16, 300, scale=12.0, spike=True),
)


def arrays(case: Case, dtype: str, seed: int = 0) -> tuple[jax.Array, ...]:
    """x, w, targets with a fifth of padding, weights; x is the same for every type but rounding."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((case.rows, case.dim)) * case.scale
    w = rng.standard_normal((case.vocab, case.dim)) * case.dim**-0.5
    if case.spike:
        x[:, 0] = 10.0
        w[case.vocab // 2, 0] = 12.0
    last = case.valid_vocab or case.vocab
    targets = np.where(rng.random(case.rows) < 0.2, -1, rng.integers(0, last, case.rows))
    weights = rng.standard_normal(case.rows)
    cast = (jnp.asarray(x, dtype), jnp.asarray(w, dtype))
    return *cast, jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32)


def expected(case: Case, given: Sequence[jax.Array]) -> dict[str, np.ndarray]:
    """Values and gradients in float64, and what rounding of their factors can amount to."""
    x, w, weights = (np.asarray(given[i]).astype(np.float64) for i in (0, 1, 3))
    targets = np.asarray(given[2])
    logits = x @ w.T
    slope = np.ones_like(logits)
    if case.softcap is not None:
        bent = np.tanh(logits / case.softcap)
        logits, slope = case.softcap * bent, 1 - bent**2
    if case.valid_vocab is not None:
        logits[:, case.valid_vocab :] = -np.inf
    largest = logits.max(axis=1, keepdims=True)
    exponentials = np.exp(logits - largest)
    total = exponentials.sum(axis=1, keepdims=True)
    rows = np.flatnonzero(targets >= 0)
    log_prob = np.zeros(len(targets))
    log_prob[rows] = (logits - largest - np.log(total))[rows, targets[rows]]
    d = -exponentials / total
    others = np.where(np.arange(d.shape[1])[None] == targets[:, None], 0.0, d).sum(axis=1)
    d[rows, targets[rows]] = -others[rows]  # 1 - probability, without cancellation
    d *= slope * np.where(targets >= 0, weights, 0.0)[:, None]
    return {
        "log_prob": log_prob,
        "dx": d @ w,
        "dw": d.T @ x,
        "bound_dx": np.abs(d) @ np.abs(w),
        "bound_dw": np.abs(d).T @ np.abs(x),
    }


def computed(case: Case, given: Sequence[jax.Array], implementation: str) -> dict[str, Any]:
    """Both forms' values and gradients, as float64. Raises Unsupported."""

    def call(x, w, targets, weights):
        return linear_log_prob(
            x, w, targets, weights, case.softcap, case.valid_vocab, implementation=implementation
        )

    def program(x, w, targets, weights):
        general, pullback = jax.vjp(lambda x, w: call(x, w, targets, None), x, w)
        (_, log_prob), gradients = jax.value_and_grad(
            lambda x, w: call(x, w, targets, weights), (0, 1), has_aux=True
        )(x, w)
        names = ("log_prob", "dx", "dw")
        return {
            "general": dict(zip(names, (general, *pullback(weights)), strict=True)),
            "weighted": dict(zip(names, (log_prob, *gradients), strict=True)),
        }

    with jax.default_matmul_precision("highest" if given[0].dtype == jnp.float32 else None):
        results = jax.jit(program)(*given)
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), results)


def errors(got: dict[str, np.ndarray], want: dict[str, np.ndarray], dtype: str) -> dict[str, float]:
    """Each result's largest error, as a share of what is allowed; not finite counts as infinite."""
    found = {}
    for name in ("log_prob", "dx", "dw"):
        difference = np.abs(got[name] - want[name])
        if name == "log_prob":
            allowed = VALUE * max(np.abs(want[name]).max(), 1.0)
        else:
            allowed = GRADIENT * np.abs(want[name]).max()
            if dtype in _ROUNDOFF:
                rounding = 2 * want[f"bound_{name}"] + np.abs(want[name])
                allowed = allowed + _ROUNDOFF[dtype] * rounding
        share = difference / allowed
        found[f"error_{name}"] = float(share.max()) if np.isfinite(share).all() else float("inf")
    return found


def sweep(
    implementations: Sequence[str],
    dtypes: Sequence[str] = DTYPES,
    cases: Sequence[Case] = CASES,
) -> Iterator[dict[str, Any]]:
    """A row per case, type, implementation and form, or one with the reason of a refusal.

    Raises UserError for a name that does not exist.
    """
    for name in implementations:
        if name not in IMPLEMENTATIONS:
            raise UserError(f"implementation {name!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    for case in cases:
        for dtype in dtypes:
            given = arrays(case, dtype)
            want = expected(case, given)
            for name in implementations:
                about = {"implementation": name, "dtype": dtype, **dataclasses.asdict(case)}
                try:
                    both = computed(case, given, name)
                except Unsupported as refusal:
                    yield about | {"refused": str(refusal)}
                    continue
                for form, got in both.items():
                    found = errors(got, want, dtype)
                    passed = max(found.values()) <= 1.0
                    yield about | {"form": form, **found, "passed": passed}
