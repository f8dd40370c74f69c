# SPDX-License-Identifier: Apache-2.0
"""Sampling against a literal numpy reading of the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import sampling
from lm.config import SamplingConfig
from lm.errors import UserError


def brute_force(logits: np.ndarray, config: SamplingConfig, valid: int | None) -> np.ndarray:
    """Probabilities of one row, token by token."""
    allowed = list(range(len(logits) if valid is None else min(valid, len(logits))))
    ranked = sorted(allowed, key=lambda i: (-logits[i], i))
    if config.temperature == 0:
        ranked = ranked[:1]
        weights = np.ones(1)
    else:
        weights = np.exp((logits[ranked] - logits[ranked[0]]) / config.temperature)
    if config.top_k:
        ranked, weights = ranked[: config.top_k], weights[: config.top_k]
    weights = weights / weights.sum()
    kept, mass = [], 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if config.top_p < 1 and mass >= config.top_p and kept:
            break
        kept.append((token, weight))
        mass += weight
    out = np.zeros(len(logits))
    for token, weight in kept:
        out[token] = weight / sum(w for _, w in kept)
    return out


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.31, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 4, 50])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.5])
def test_log_probs_against_brute_force(temperature, top_k, top_p):
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = np.random.default_rng(0).normal(size=(5, 17)).astype(np.float32) * 3
    logits[1] = np.round(logits[1])  # ties
    logits[2] = 0.0  # nothing but ties
    for valid in (None, 11, 40):
        got = np.exp(sampling.log_probs(jnp.asarray(logits), config, valid))
        want = np.stack([brute_force(row.astype(np.float64), config, valid) for row in logits])
        np.testing.assert_array_equal(got > 0, want > 0)
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_top_p_keeps_the_token_that_crosses_it():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
    for top_p, kept in [(0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.95, 4)]:
        config = SamplingConfig(temperature=1.0, top_p=top_p)
        assert int(jnp.isfinite(sampling.filtered_logits(logits, config)).sum()) == kept


def test_top_k_renormalises_before_top_p():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    config = SamplingConfig(temperature=1.0, top_k=2, top_p=0.56)
    # 0.4 / 0.7 = 0.571 already reaches 0.56; without renormalising 0.4 would not
    got = sampling.filtered_logits(logits, config)
    np.testing.assert_array_equal(jnp.isfinite(got), [[True, False, False, False]])


def test_leading_axes():
    config = SamplingConfig(temperature=0.7, top_k=5, top_p=0.8)
    logits = jax.random.normal(jax.random.key(0), (2, 3, 13))
    flat = sampling.log_probs(logits.reshape(6, 13), config, 12)
    np.testing.assert_array_equal(sampling.log_probs(logits, config, 12).reshape(6, 13), flat)


def test_greedy_takes_the_lowest_index_of_ties_and_no_padding():
    logits = jnp.array([[1.0, 3.0, 3.0, 9.0], [2.0, 2.0, 2.0, 2.0]])
    got = sampling.sample(logits, SamplingConfig(), jax.random.key(0), valid_vocab=3)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, [1, 0])


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-46])
def test_tiny_temperatures_are_greedy_and_finite(temperature):
    logits = jnp.array([[-50.0, 80.0, 79.0]])
    config = SamplingConfig(temperature=temperature)
    got = sampling.log_probs(logits, config)
    np.testing.assert_array_equal(np.exp(got), [[0.0, 1.0, 0.0]])
    np.testing.assert_array_equal(sampling.sample(logits, config, jax.random.key(1)), [1])


def test_draws_follow_the_distribution():
    config = SamplingConfig(temperature=0.8, top_k=6, top_p=0.9)
    row = jax.random.normal(jax.random.key(3), (1, 10)) * 2
    want = np.exp(sampling.log_probs(row, config, 9))[0]
    count = 20_000
    keys = jax.random.split(jax.random.key(4), count)
    logits = jnp.broadcast_to(row, (count, 10))
    for key in (keys, keys[0]):
        draws = np.asarray(sampling.sample(logits, config, key, 9))
        frequency = np.bincount(draws, minlength=10) / count
        np.testing.assert_array_equal(frequency > 0, want > 0)
        # five standard deviations of a binomial
        assert np.all(np.abs(frequency - want) <= 5 * np.sqrt(want * (1 - want) / count) + 1e-9)


def test_a_row_with_its_own_key_ignores_the_other_rows():
    config = SamplingConfig(temperature=1.0)
    logits = jax.random.normal(jax.random.key(5), (4, 50))
    keys = jax.random.split(jax.random.key(6), 4)
    together = sampling.sample(logits, config, keys)
    alone = [sampling.sample(logits[i : i + 1], config, keys[i : i + 1])[0] for i in range(4)]
    np.testing.assert_array_equal(together, jnp.stack(alone))


@pytest.mark.parametrize(
    "values", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_bad_settings(values):
    with pytest.raises(UserError, match=next(iter(values))):
        SamplingConfig(**values)
