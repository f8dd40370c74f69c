# SPDX-License-Identifier: Apache-2.0
"""The best slots: by the sort that XLA has on accelerators, by a search for the lowest picked score
on CPU.

By XLA's estimates a v5e takes 60 us for the largest 2048 of 524288 scores, and 8 us for each of the
32 turns of the search. On two busy CPU cores the sort takes 200 to 500 ms and the search 10 to 25.
"""

import jax
import jax.numpy as jnp

from ops import dispatch
from ops._varying import common_varying, varying_like

_OUTSIDE = jnp.iinfo(jnp.int32).min  # below the key of -inf
# Scores per line: the sums of all lines against the k lines that are looked into.
_LANES = 16


def top_tokens(
    scores: jax.Array,  # [R, S] float32
    k: int,
    begin: jax.Array,  # [R] int32 in 0 .. S
    end: jax.Array,  # [R] int32 in 0 .. S
) -> tuple[jax.Array, jax.Array]:  # [R, k] int32, [R] int32
    S = scores.shape[1]
    scores, begin, end = common_varying((scores, begin, end))
    keys = ordered_keys(scores, begin, end)
    pick = by_search if dispatch.current_platform() == "cpu" else by_sort
    counts = jnp.clip(end - begin, 0, k)
    picked = jnp.pad(pick(keys, min(k, S)), ((0, 0), (0, max(0, k - S))), constant_values=S)
    return picked, counts


def ordered_keys(scores: jax.Array, begin: jax.Array, end: jax.Array) -> jax.Array:
    """[R, S] int32 that order as the scores do, equal scores equal; _OUTSIDE beyond the range."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    keys = jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)
    slots = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
    inside = (slots >= begin[:, None]) & (slots < end[:, None])
    return jnp.where(inside, keys, _OUTSIDE)


def by_sort(keys: jax.Array, k: int) -> jax.Array:
    """[R, k] int32, ascending: the slots of the k largest keys; S where fewer lie in the range."""
    largest, slots = jax.lax.top_k(keys, k)
    return jnp.sort(jnp.where(largest == _OUTSIDE, keys.shape[1], slots), axis=1)


def by_search(keys: jax.Array, k: int) -> jax.Array:
    """As `by_sort`: finds the k-th largest key bit by bit, then compacts what is above or, from the
    first slot on, equal to it."""
    R, S = keys.shape
    lowest = _kth_largest(keys, k)
    keys = jnp.pad(keys, ((0, 0), (0, -S % _LANES)), constant_values=_OUTSIDE)
    lines = keys.reshape(R, -1, _LANES)
    above = jnp.sum(lines > lowest[:, None, None], axis=2, dtype=jnp.int32)  # [R, lines]
    equal = jnp.sum(lines == lowest[:, None, None], axis=2, dtype=jnp.int32)
    wanted = jnp.where(lowest == _OUTSIDE, 0, k - jnp.sum(above, axis=1, dtype=jnp.int32))
    equal_before = jnp.cumsum(equal, axis=1) - equal
    taken = above + jnp.clip(wanted[:, None] - equal_before, 0, equal)
    taken_until = jnp.cumsum(taken, axis=1)

    # Entry i of the result lies in the first line until which more than i are taken.
    entries = jnp.arange(k, dtype=jnp.int32)
    find = jax.vmap(lambda sums: jnp.searchsorted(sums, entries, side="right"))
    line = find(taken_until).astype(jnp.int32)
    exists = line < lines.shape[1]
    line = jnp.where(exists, line, 0)
    before, ties = (
        jnp.take_along_axis(x, line, axis=1)
        for x in (taken_until - taken, wanted[:, None] - equal_before)
    )
    lanes = jnp.take_along_axis(lines, line[:, :, None], axis=1)  # [R, k, _LANES]
    is_equal = lanes == lowest[:, None, None]
    tie_fits = jnp.cumsum(is_equal.astype(jnp.int32), axis=2) <= ties[:, :, None]
    is_taken = (lanes > lowest[:, None, None]) | (is_equal & tie_fits)
    order = jnp.cumsum(is_taken.astype(jnp.int32), axis=2)
    lane = jnp.sum(order <= (entries[None] - before)[:, :, None], axis=2, dtype=jnp.int32)
    return jnp.where(exists, line * _LANES + lane, S)


def _kth_largest(keys: jax.Array, k: int) -> jax.Array:
    """[R]: the largest number that k keys reach."""

    def next_bit(step, lowest):
        larger = lowest + (jnp.int32(1) << (31 - step))  # the first one wraps around to 0
        reach = jnp.sum(keys >= larger[:, None], axis=1, dtype=jnp.int32)
        return jnp.where(reach >= k, larger, lowest)

    start = varying_like(jnp.full(keys.shape[:1], _OUTSIDE, jnp.int32), keys)
    return jax.lax.fori_loop(0, 32, next_bit, start)
