# SPDX-License-Identifier: Apache-2.0
"""A model that mostly counts, and heads that mostly know it: drafts are right often, never always.

Embeddings are orthonormal, so a state is nearly its token's vector; the unembedding asks for the
predecessor. Factor s of component 0 moves a state s places on, the other components by one place
more or less; the layers' own random contribution spoils all of it now and then.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lm import transformer
from lm.config import ModelConfig
from lm.cp_heads import head
from lm.cp_heads.head import HeadConfig

MODEL = ModelConfig(
    vocab_size=16,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
)


@functools.cache
def params_of(config: ModelConfig = MODEL, noise: float = 0.35) -> transformer.Params:
    rng = np.random.default_rng(0)

    def leaf(x):
        scale = 1.0 if x.ndim < 3 else noise / np.sqrt(config.embed_dim)
        return jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32)

    params = jax.tree.map(leaf, transformer.abstract(config)[1])
    layers = params["layers"]
    for name in ("attention_norm", "mlp_norm"):
        layers[name]["scale"] = 2 * jnp.ones_like(layers[name]["scale"])
    base = _base(config)
    return params | {
        "embed": {"table": jnp.asarray(base, jnp.float32)},
        "unembed": {"table": jnp.asarray(np.roll(base, 1, axis=0), jnp.float32)},
        "final_norm": {"scale": jnp.full(config.embed_dim, 1.5)},
    }


def head_of(config: HeadConfig, model: ModelConfig = MODEL) -> head.HeadParams:
    """Needs the "full" expander: component c of factor s adds s + c or s - c to the token."""
    config = dataclasses.replace(config, expander="full")
    params = head.init(jax.random.key(1), config, model)
    base = _base(model)
    kernel = np.zeros((config.predicted, config.rank, model.embed_dim, model.embed_dim))
    for step in range(config.predicted):
        for component in range(config.rank):
            sign = 1 if component % 2 else -1
            shift = step + sign * ((component + 1) // 2)
            # a row's vector becomes that of the token `shift` places on
            kernel[step, component] = base.T @ np.roll(base, -shift, axis=0) - np.eye(len(base.T))
    noise = 0.1 * np.random.default_rng(1).normal(size=kernel.shape)
    kernel = jnp.asarray(kernel + noise / np.sqrt(model.embed_dim), jnp.float32)
    return params | {"expander": {"kernel": kernel}}


def _base(config: ModelConfig) -> np.ndarray:
    """Orthonormal rows [V, D]."""
    rows = np.random.default_rng(2).normal(size=(config.embed_dim, config.embed_dim))
    return np.linalg.qr(rows)[0][: config.vocab_size]


def prompts_of(lengths) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, 16, n).astype(np.int32) for n in lengths]
