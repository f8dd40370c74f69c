# SPDX-License-Identifier: Apache-2.0
"""The model: what depends on what, variants, rematerialisation, adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import contexts, lora, transformer, tuned
from lm.config import LoraConfig, ModelConfig
from ops.visibility import Visibility

CONFIG = ModelConfig(
    vocab_size=32, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24
)
VARIANTS = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tied_embeddings": True},
    "qwen3": {"qk_norm": True},
    "gemma": {
        "activation": "gelu_tanh",
        "norm_plus_one": True,
        "scale_embeddings": True,
        "tied_embeddings": True,
        "logit_softcap": 5.0,
    },
}


def run(config, params, tokens, positions, visibility, remat="none"):
    context = contexts.Training(visibility)
    states, _ = transformer.hidden(config, params, tokens, positions, context, remat=remat)
    return transformer.logits(config, params, states)


@pytest.fixture(scope="module")
def inputs():
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)
    positions = jnp.tile(jnp.arange(12)[None], (2, 1))
    return tokens, positions


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_obey_visibility(variant, inputs):
    """Zero from tokens that a row cannot see, non-zero from those it can."""
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    _, positions = inputs
    config = dataclasses.replace(config, tied_embeddings=False)  # only inputs are to move
    params = transformer.init(config, jax.random.key(0))
    until = jnp.tile(jnp.array([12, 12, 5, 5, 5, 12, 12, 9, 9, 12, 12, 12])[None], (2, 1))
    table = params["embed"]["table"]

    def row(embedded, index):  # one-hot rows stand in for tokens, so that each is a variable
        own = {**params, "embed": {"table": embedded}}
        shifted = jnp.tile(jnp.arange(12)[None], (2, 1))  # token t of this table is position t
        out = run(config, own, shifted, positions, Visibility(until=until))
        return jnp.sum(out[0, index, :4] * jnp.arange(1.0, 5.0))

    for index in (4, 6, 8, 11):
        grads = jax.grad(row)(table[:32], index)
        sees = np.abs(np.asarray(grads)[:12]).max(-1) > 0
        expected = (np.arange(12) <= index) & (index < np.asarray(until)[0])
        np.testing.assert_array_equal(sees, expected)


def test_positions_are_the_callers(inputs):
    params = transformer.init(CONFIG, jax.random.key(0))
    tokens, positions = inputs
    visibility = Visibility.causal(2, 12)
    base = run(CONFIG, params, tokens, positions, visibility)
    moved = run(CONFIG, params, tokens, positions + 1000, visibility)
    np.testing.assert_allclose(base, moved, atol=2e-4)  # RoPE is relative
    stretched = run(CONFIG, params, tokens, positions * 2, visibility)
    assert np.abs(np.asarray(base - stretched)).max() > 1e-2


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(remat, inputs):
    params = transformer.init(CONFIG, jax.random.key(0))

    def loss(params, remat):
        return jnp.sum(run(CONFIG, params, *inputs, Visibility.causal(2, 12), remat) ** 2)

    plain = jax.jit(jax.grad(loss), static_argnums=1)(params, "none")
    again = jax.jit(jax.grad(loss), static_argnums=1)(params, remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)


def test_layers_apart_are_the_same_model(inputs):
    params = transformer.init(CONFIG, jax.random.key(0))
    visibility = Visibility.causal(2, 12)
    expected = run(CONFIG, params, *inputs, visibility)
    apart = transformer.unstacked(params)
    np.testing.assert_allclose(run(CONFIG, apart, *inputs, visibility), expected, atol=1e-5)
    assert transformer.unstacked(apart) is apart
    host = transformer.unstacked(jax.tree.map(np.asarray, params))
    jax.tree.map(np.testing.assert_array_equal, apart, host)
    assert tuned.digest(apart) == tuned.digest(params)


def test_what_is_recomputed(inputs):
    """Attention is not, under "dots": its forward loops are in the gradient once."""
    params = transformer.abstract(CONFIG)[1]

    def loops(remat):
        def loss(params):
            return jnp.sum(run(CONFIG, params, *inputs, Visibility.causal(2, 12), remat) ** 2)

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("while[")

    assert loops("none") == loops("dots") < loops("full")


def test_bfloat16_stays_close(inputs):
    params = transformer.init(CONFIG, jax.random.key(0))
    full = run(CONFIG, params, *inputs, Visibility.causal(2, 12))
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    low = run(half, params, *inputs, Visibility.causal(2, 12))
    assert low.dtype == jnp.float32
    error = jnp.linalg.norm(low - full) / jnp.linalg.norm(full)
    assert 1e-5 < error < 2e-2


def test_adapters_merge_into_the_weights(inputs):
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2, targets=("q", "o", "down")))
    params = transformer.init(config, jax.random.key(0))
    noise = iter(jax.random.split(jax.random.key(3), 100))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.random.normal(next(noise), x.shape) if path[-1].key == "lora_b" else x,
        params,
    )
    merged_config, merged = lora.merge_adapters(config, params)
    assert merged_config == CONFIG
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(
        jnp.shape, transformer.abstract(CONFIG)[1]
    )
    a = run(config, params, *inputs, Visibility.causal(2, 12))
    b = run(merged_config, merged, *inputs, Visibility.causal(2, 12))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_parameter_count():
    sizes = jax.tree.map(lambda x: x.size, transformer.init(CONFIG, jax.random.key(0)))
    assert transformer.count_parameters(CONFIG) == sum(jax.tree.leaves(sizes))
