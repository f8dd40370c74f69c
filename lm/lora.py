# SPDX-License-Identifier: Apache-2.0
"""Merging low-rank adapters into the weights that they adapt."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from lm.config import LoraConfig, ModelConfig
from lm.transformer import Params


def merge_adapters(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """W + (alpha / rank) A B for every adapted linear map, and the config without adapters."""
    if not config.lora.rank:
        return config, params
    scale = config.lora.alpha / config.lora.rank
    return dataclasses.replace(config, lora=LoraConfig()), _merge(params, scale)


def _merge(tree: Params, scale: float) -> Params:
    if "lora_a" in tree:
        a, b = (jnp.asarray(tree[name], jnp.float32) for name in ("lora_a", "lora_b"))
        kernel = tree["kernel"]
        # leading axis: layers; A is [L, *inputs, r], B is [L, r, *outputs]
        update = jnp.einsum(
            "lir,lro->lio",
            a.reshape(a.shape[0], -1, a.shape[-1]),
            b.reshape(b.shape[0], b.shape[1], -1),
        )
        merged = (kernel.astype(jnp.float32) + scale * update.reshape(kernel.shape)).astype(
            kernel.dtype
        )
        rest = {name: x for name, x in tree.items() if not name.startswith("lora_")}
        return rest | {"kernel": merged}
    return {
        name: _merge(value, scale) if isinstance(value, Mapping) else value
        for name, value in tree.items()
    }
