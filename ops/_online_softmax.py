# SPDX-License-Identifier: Apache-2.0
"""Softmax over keys that arrive block by block (Milakov and Gimelshein, arXiv 1805.02867), in
float32.

The state of a row is the largest score so far, the sum of exp(score - largest) and the sum of
exp(score - largest) times the value. A row that has seen nothing has largest -inf and sums 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class State(NamedTuple):
    largest: jax.Array  # [..., rows]
    total: jax.Array  # [..., rows]
    weighted: jax.Array  # [..., rows, H]


def start(shape: tuple[int, ...], head_dim: int) -> State:
    return State(
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )


def add(state: State, scores: jax.Array, values: jax.Array) -> State:
    """Takes in one block: scores [..., rows, keys] float32 with -inf where invisible, values [...,
    keys, H]."""
    largest = jnp.maximum(state.largest, jnp.max(scores, axis=-1))
    base = jnp.where(largest == -jnp.inf, 0.0, largest)
    weights = jnp.exp(scores - base[..., None])
    rescale = jnp.exp(state.largest - base)
    weighted = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return State(
        largest,
        state.total * rescale + jnp.sum(weights, axis=-1),
        state.weighted * rescale[..., None] + weighted,
    )


def finish(state: State) -> tuple[jax.Array, jax.Array]:
    """Output [..., rows, H] and log-sum-exp [..., rows]; zeros and -inf for rows that saw
    nothing."""
    sees = state.total > 0
    total = jnp.where(sees, state.total, 1.0)
    lse = jnp.where(sees, state.largest + jnp.log(total), -jnp.inf)
    return state.weighted / total[..., None], lse
