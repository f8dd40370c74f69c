# SPDX-License-Identifier: Apache-2.0
"""Timing of device work of a few microseconds: many turns of one jitted loop, divided.

Starting a program takes longer than such work does. A turn's input depends on the turn before, by
values too small to change it, so that the compiler can neither drop a turn nor take work out of the
loop, except for what depends on the large arrays alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.benchmarks.timing import Stopwatch

Stage = Callable[[dict[str, jax.Array], Any], Any]  # (small arrays, large ones) -> results


def lower(stage: Stage, small: dict[str, jax.Array], large: Any, turns: int) -> jax.stages.Lowered:
    """`turns` runs of the stage as one program of (small, large)."""

    def program(small, large):
        def turn(_, moved):
            return _nudged(moved, stage(moved, large))

        # the number of turns is known to the compiler: the host does not wait for each
        return jax.lax.fori_loop(0, turns, turn, small)

    return jax.jit(program).lower(small, large)


def watch(compiled: jax.stages.Compiled, small: dict[str, jax.Array], large: Any) -> Stopwatch:
    """Of whole programs."""
    return Stopwatch(functools.partial(compiled, small, large), jax.block_until_ready)


def _nudged(small: dict[str, jax.Array], results: Any) -> dict[str, jax.Array]:
    parts = [
        jnp.clip(leaf.reshape(-1)[0].astype(jnp.float32), -1.0, 1.0)
        for leaf in jax.tree.leaves(results)
    ]
    tiny = 1e-30 * functools.reduce(jnp.add, parts)
    nothing = jnp.minimum(jnp.abs(tiny), 0.0).astype(jnp.int32)

    def nudge(array):
        integer = jnp.issubdtype(array.dtype, jnp.integer)
        return array + (nothing.astype(array.dtype) if integer else tiny.astype(array.dtype))

    return jax.tree.map(nudge, small)


def copied(
    small: dict[str, jax.Array], large: jax.Array, turns: int
) -> tuple[jax.stages.Lowered, int]:
    """A program that reads and writes a large array in every turn, and the bytes of one turn."""

    def program(small, large):
        return jax.lax.fori_loop(0, turns, lambda _, x: x + small["one"], large)

    lowered = jax.jit(program).lower(small, large)
    return lowered, 2 * large.size * large.dtype.itemsize
