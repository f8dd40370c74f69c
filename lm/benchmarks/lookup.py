# SPDX-License-Identifier: Apache-2.0
"""The gradient of a table that rows are looked up in, by what sums it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import layers
from lm.benchmarks import timing
from lm.config import require_positive
from lm.errors import UserError

Gradient = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (table, rows, g) -> as table
OWN = "float32"


def _pulled(function: Callable[[jax.Array, jax.Array], jax.Array]) -> Gradient:
    return lambda table, rows, g: jax.vjp(lambda x: function(x, rows), table)[1](g)[0]


def _product(table: jax.Array, rows: jax.Array, g: jax.Array) -> jax.Array:
    chosen = jax.nn.one_hot(rows, len(table), dtype=g.dtype)
    return jax.lax.dot_general(
        chosen, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    ).astype(table.dtype)


def _sorted(table: jax.Array, rows: jax.Array, g: jax.Array) -> jax.Array:
    order = jnp.argsort(rows)
    sums = jax.ops.segment_sum(
        g[order].astype(jnp.float32), rows[order], len(table), indices_are_sorted=True
    )
    return sums.astype(table.dtype)


CONTENDERS: Mapping[str, Gradient] = {
    OWN: _pulled(layers.lookup),  # ours
    "indexing": _pulled(lambda table, rows: table[rows]),  # what autodiff makes of table[rows]
    "one_hot": _product,
    "sorted": _sorted,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tokens of Zipf's law, as those of a text: the share of the n-th most frequent is 1/n."""

    tokens: int = 32768
    vocab: int = 768
    dim: int = 384
    dtype: str = "bfloat16"
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    repeats: int = 20
    seconds: float = 1.0

    def check(self) -> None:
        """Raises UserError."""
        for name in ("tokens", "vocab", "dim", "repeats"):
            require_positive(f"--{name}", getattr(self, name))
        for name in self.contenders:
            if name not in CONTENDERS:
                raise UserError(f"contender {name!r} is not one of {', '.join(CONTENDERS)}")


def measure(plan: Plan) -> Iterator[dict[str, Any]]:
    """A row of each contender: time, and the largest error of a row's sum as a share of it."""
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, plan.vocab + 1)
    chosen = rng.choice(plan.vocab, plan.tokens, p=shares / shares.sum())
    rows, table = jnp.asarray(chosen), jnp.zeros((plan.vocab, plan.dim), plan.dtype)
    g = jnp.asarray(rng.uniform(0.5, 1.5, (plan.tokens, plan.dim)), plan.dtype)
    expected = np.zeros((plan.vocab, plan.dim))
    np.add.at(expected, chosen, np.asarray(g, np.float64))
    compiled = {name: jax.jit(CONTENDERS[name]) for name in plan.contenders}
    errors = {}
    for name, gradient in compiled.items():
        off = np.abs(np.asarray(gradient(table, rows, g), np.float64) - expected)
        errors[name] = float((off / np.maximum(expected, 1.0)).max())
    watches = [
        timing.Stopwatch(lambda f=f: f(table, rows, g), jax.block_until_ready)
        for f in compiled.values()
    ]
    timing.rounds(watches, plan.repeats, plan.seconds)
    for name, watch in zip(compiled, watches, strict=True):
        yield {
            "implementation": name,
            "tokens": plan.tokens,
            "vocab": plan.vocab,
            "dim": plan.dim,
            "dtype": plan.dtype,
            "relative_error": errors[name],
            **watch.summary(),
        }
