# SPDX-License-Identifier: Apache-2.0
"""Types under `jax.shard_map`: which mesh axes a value differs over.

Loop carries must keep one type, and a hand-written vjp must return cotangents of its arguments'
types. Both hold when everything varies over the same axes, so ops cast their arguments first; jax
transposes the cast to a sum.
"""

from typing import Any

import jax


def _axes(array: jax.Array) -> frozenset[str]:
    return frozenset(jax.typeof(array).manual_axis_type.varying)


def common_varying(tree: Any) -> Any:
    """The same pytree of arrays, each cast to vary over every mesh axis that any of them varies
    over."""
    axes = frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: _cast(leaf, axes), tree)


def varying_like(tree: Any, like: jax.Array) -> Any:
    """The same pytree of arrays (loop carries made of constants), cast to vary as `like` does."""
    return jax.tree.map(lambda leaf: _cast(leaf, _axes(like)), tree)


def _cast(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array
