# SPDX-License-Identifier: Apache-2.0
"""Shapes of what `lm.generate.prepare` gives, for loops that are compiled for other hardware."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lm import transformer
from lm.config import ModelConfig


def shapes(model: ModelConfig, place: Callable[[Any], Any]) -> transformer.Params:
    """`place` gives the shardings of stacked parameters."""
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), transformer.abstract(model)[1]
    )

    def layer(x, sharding):
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)

    def whole(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    places = place(stacked)
    one = jax.tree.map(layer, stacked.pop("layers"), places.pop("layers"))
    return jax.tree.map(whole, stacked, places) | {"layers": (one,) * model.num_layers}
