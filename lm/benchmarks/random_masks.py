# SPDX-License-Identifier: Apache-2.0
"""Random masks of every family that the ops promise: trees, async programs and plain windows, each
alone and packed, with ragged ends, padding and chunks of rows."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from lm.benchmarks import masks
from ops.visibility import Visibility

KINDS = ("tree", "async", "window")
FAMILIES = tuple(f"{kind}, {how}" for kind in KINDS for how in ("alone", "packed"))


def random_visibility(
    seed: int, family: str, batch: int, num_rows: int, num_keys: int, runs: bool
) -> Visibility:
    """A mask of a family of `FAMILIES` over `num_keys` keys, every sequence another one.

    A sequence ends somewhere in the second half of the keys (rarely before); what follows is
    padding. With fewer rows than keys the rows start anywhere, past the end too. runs: give the
    hidden vectors also where nothing is hidden, so that one program serves all families; async
    programs always have them.
    """
    rng = np.random.default_rng(seed)
    kind, how = family.split(", ")
    vectors = np.stack([_sequence(rng, kind, how == "packed", num_keys) for _ in range(batch)])
    until, hidden_from, hidden_until = (jnp.asarray(vectors[:, i], jnp.int32) for i in range(3))
    offset = None
    if num_rows != num_keys:
        drawn = rng.integers(0, max(num_keys - num_rows, 0) + 17, batch)
        offset = jnp.asarray(drawn, jnp.int32)
    if not runs and kind != "async":
        return Visibility(until, row_offset=offset)
    return Visibility(until, hidden_from, hidden_until, offset)


def _sequence(rng: np.random.Generator, kind: str, packed: bool, num_keys: int) -> np.ndarray:
    """[3, S]: `until`, `hidden_from` and `hidden_until`, padding included."""
    shortest = num_keys // 2 if rng.integers(8) else 1
    length = int(rng.integers(shortest, num_keys + 1))
    make = {"tree": _tree, "async": _program, "window": _window}[kind](rng)
    if packed:
        joined = masks.end_to_end(lambda: make(int(rng.integers(1, length // 3 + 2))), length)
    else:
        joined = make(length)[:, :length]
        joined[0] = np.minimum(joined[0], length)
    return np.pad(joined, ((0, 0), (0, num_keys - joined.shape[1])))


def _tree(rng: np.random.Generator) -> Callable[[int], np.ndarray]:
    def make(length: int) -> np.ndarray:
        """Runs of tokens, each below some run that is still open; the first is the root."""
        until = np.empty(length, int)
        open_ends, node = [length], 0
        while node < length:
            while open_ends[-1] <= node:
                open_ends.pop()
            end = open_ends[-1] if node == 0 else int(rng.integers(node, open_ends[-1])) + 1
            run = min(int(rng.geometric(1 / 40)), end - node)
            until[node : node + run] = end
            open_ends.append(end)
            node += run
        return _without_runs(until)

    return make


def _program(rng: np.random.Generator) -> Callable[[int], np.ndarray]:
    def make(length: int) -> np.ndarray:
        """Scaled to about the length, which its caller cuts."""
        return masks.draw_program(rng, max(length // 48, 2))

    return make


def _window(rng: np.random.Generator) -> Callable[[int], np.ndarray]:
    window = int(rng.choice([1, 7, 64, 200, 500, 10**6]))

    def make(length: int) -> np.ndarray:
        return _without_runs(np.minimum(np.arange(length) + window, length))

    return make


def _without_runs(until: np.ndarray) -> np.ndarray:
    return np.stack([until, np.zeros_like(until), np.zeros_like(until)])
