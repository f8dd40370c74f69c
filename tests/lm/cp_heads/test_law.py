# SPDX-License-Identifier: Apache-2.0
"""What decoding emits has the model's own law: enumerated exactly, and drawn many times."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import transformer
from lm.config import ModelConfig, SamplingConfig
from lm.cp_heads import acceptance, decode, head, law
from lm.cp_heads.drafters import Heads, Target
from lm.cp_heads.head import HeadConfig

MODEL = ModelConfig(
    vocab_size=3, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8
)
PROMPT = np.array([1, 0], np.int32)
PLAIN = SamplingConfig(temperature=1.0, max_new_tokens=4)
CHAIN = Heads(HeadConfig(rank=3, predicted=3, noise=1.0))
HMM = HeadConfig(rank=2, predicted=3, noise=1.0, transition="constant", draft_vocab=2)
TREE = Heads(HMM, chains=2)


@functools.cache
def params():
    rng = np.random.default_rng(0)

    def leaf(x):
        scale = 0.6 if x.ndim < 3 else 1 / np.sqrt(MODEL.embed_dim)
        return jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32)

    return jax.tree.map(leaf, transformer.abstract(MODEL)[1])


def weights_of(drafter):
    return head.init(jax.random.key(1), drafter.config, MODEL)


@functools.cache
def wanted(sampling, length=3):
    return law.target_law(Target(MODEL, sampling), params(), PROMPT, length)


def deviation(drafter, sampling):
    target = Target(MODEL, sampling)
    got = law.emitted_law(target, params(), drafter, weights_of(drafter), PROMPT, 3)
    assert got.sum() == pytest.approx(1.0, abs=1e-6)
    return np.abs(got - wanted(sampling)).max()


@pytest.mark.parametrize(
    ("drafter", "sampling"),
    [
        (CHAIN, SamplingConfig(temperature=0.7, top_k=2, max_new_tokens=4)),
        (TREE, SamplingConfig(temperature=1.3, top_p=0.8, max_new_tokens=4)),
    ],
    ids=["cp_top_k", "hmm_tree_top_p_draft_vocab"],
)
def test_the_emitted_law_is_the_models(drafter, sampling):
    assert deviation(drafter, sampling) < 1e-6


def test_the_enumeration_sees_a_wrong_replacement(monkeypatch):
    """Replacing a rejected token by a draw from p, not from what is left of it, is not lossless."""
    law._cycle.clear_cache()
    monkeypatch.setattr(acceptance, "residual", lambda log_p, log_q: log_p)
    assert deviation(CHAIN, PLAIN) > 1e-3
    law._cycle.clear_cache()


def test_many_draws_have_that_law():
    """The loop as a whole: keys, drafts, roll-back of the cache."""
    count = 8192
    got, statistics = decode.decode(
        Target(MODEL, PLAIN),
        params(),
        CHAIN,
        weights_of(CHAIN),
        [PROMPT] * count,
        (),
        jax.random.key(3),
    )
    tokens = np.stack([g.tokens for g in got])
    strings = np.bincount(tokens @ 3 ** np.arange(3, -1, -1), minlength=81)
    expected = count * wanted(PLAIN, 4).ravel()
    assert expected.min() > 5
    chi2 = np.sum((strings - expected) ** 2 / expected)
    assert chi2 < 80 + 4 * np.sqrt(2 * 80)  # mean and four standard deviations
    assert 1.2 < statistics.summary()["tokens_per_call"] < 2.9


def test_nothing_left_of_p_is_p():
    log_p = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    log_q = jnp.log(jnp.array([[0.25, 0.75], [0.25, 0.75]]))
    got = np.exp(acceptance.residual(log_p, log_q))
    np.testing.assert_allclose(got, [[0.25, 0.75], [1.0, 0.0]], atol=1e-6)
