# SPDX-License-Identifier: Apache-2.0
"""What contenders in the `linear_log_prob` benchmark are given, and how JAX's are compiled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.benchmarks.attention_problem import Prepared

# form -> products of rows * D * V that it takes without keeping the logits, and whose gradients
FORMS = {"weighted": (3, ("x", "w")), "general": (4, ("x", "w")), "frozen_w": (3, ("x",))}

LogProb = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, w, targets) -> [R]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Random hidden states and an unembedding whose logits have deviation 1.

    weighted: the mean of log-probabilities, a weighted sum whose weights are known beforehand.
    general: log-probabilities of rows, and a cotangent for each that only the backward pass knows.
    frozen_w: general, without the gradient of w.
    """

    form: str
    x: jax.Array  # [R, D]
    w: jax.Array  # [V, D]
    targets: jax.Array  # [R] int32
    weights: jax.Array  # [R] float32: those of the weighted form, else cotangents

    @classmethod
    def make(
        cls, form: str, rows: int, dim: int, vocab: int, dtype: str, seed: int = 0
    ) -> "Problem":
        keys = jax.random.split(jax.random.key(seed), 4)
        x = jax.random.normal(keys[0], (rows, dim), dtype)
        w = jax.random.normal(keys[1], (vocab, dim), dtype) * jnp.asarray(dim**-0.5, dtype)
        targets = jax.random.randint(keys[2], (rows,), 0, vocab, jnp.int32)
        weights = jnp.full((rows,), 1 / rows, jnp.float32)
        if form != "weighted":
            weights = weights * jax.random.uniform(keys[3], (rows,), jnp.float32, 0.5, 1.5)
        return cls(form, x, w, targets, weights)

    @property
    def wanted(self) -> tuple[str, ...]:
        return FORMS[self.form][1]

    @property
    def flops(self) -> float:
        return FORMS[self.form][0] * self.product_flops

    @property
    def product_flops(self) -> float:
        return 2.0 * self.x.shape[0] * self.w.size

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        return self.x, self.w, self.targets, self.weights


def prepare(
    problem: Problem,
    log_prob: LogProb,
    total: Callable[..., jax.Array] | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Prepared:
    """Compiles a problem's form: (value, gradients that are wanted).

    total: (x, w, targets, weights) -> scalar, for a contender that has a weighted form of its own.
    """

    def weighted(x, w, targets, weights):
        if total is not None:
            return total(x, w, targets, weights)
        return jnp.sum(weights * log_prob(x, w, targets))

    def program(x, w, targets, weights):
        if problem.form == "weighted":
            value, pullback = jax.vjp(lambda x, w: weighted(x, w, targets, weights), x, w)
            return value, *pullback(jnp.ones_like(value))
        if problem.wanted == ("x",):
            value, pullback = jax.vjp(lambda x: log_prob(x, w, targets), x)
        else:
            value, pullback = jax.vjp(lambda x, w: log_prob(x, w, targets), x, w)
        return value, *pullback(weights)

    jitted = jax.jit(program, compiler_options=compiler_options)
    compiled = jitted.lower(*problem.arrays).compile()
    return Prepared(
        functools.partial(compiled, *problem.arrays),
        jax.block_until_ready,
        int(compiled.memory_analysis().temp_size_in_bytes),
        rows_of,
    )


def rows_of(result: jax.Array, rows: np.ndarray) -> np.ndarray:
    """Those rows in float32; a scalar is its own row."""
    chosen = result if result.ndim == 0 else result[rows % len(result)]
    return np.asarray(chosen.astype(jnp.float32))
