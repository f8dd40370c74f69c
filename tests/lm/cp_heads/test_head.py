# SPDX-License-Identifier: Apache-2.0
"""The CP head: its shapes, its start, and one line for every head that cannot be built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ModelConfig
from lm.cp_heads import head
from lm.errors import UserError

MODEL = ModelConfig(vocab_size=11, embed_dim=16)
EVERY = [(t, e, v) for t in head.TRANSITIONS for e in head.EXPANDERS for v in (0, 5)]


@pytest.mark.parametrize(("kind", "expander", "draft_vocab"), EVERY)
def test_components_and_transitions_are_distributions(kind, expander, draft_vocab):
    config = head.HeadConfig(3, 2, kind, expander, expander_rank=4, draft_vocab=draft_vocab)
    params = head.init(jax.random.key(0), config, MODEL)
    h = jax.random.normal(jax.random.key(1), (2, 4, 16))
    table = jax.random.normal(jax.random.key(2), (11, 16))
    np.testing.assert_allclose(jnp.exp(head.gate(params, h)).sum(-1), 1, rtol=1e-6)
    for step in range(2):
        assert head.components(params, config, h, step).shape == (2, 4, 3, 16)
        out = head.log_probs(params, config, h, step, table, softcap=5.0, valid_vocab=9)
        assert out.shape == (2, 4, 3, 11)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(jnp.exp(out).sum(-1), 1, rtol=1e-6)
        assert (np.asarray(out[..., draft_vocab or 9 :]) == -np.inf).all()
        assert np.isfinite(out[..., : draft_vocab or 9]).all()
    log_a = head.transition(params, config, h, 0)
    assert (log_a is None) == (kind == "identity")
    assert head.transition(params, config, h, 1) is None
    if log_a is not None:
        assert log_a.shape == (2, 4, 3, 3)
        np.testing.assert_allclose(jnp.exp(log_a).sum(-1), 1, rtol=1e-6)
        np.testing.assert_allclose(jnp.exp(log_a[..., 1, 1]), 0.98, rtol=1e-5)


@pytest.mark.parametrize("expander", head.EXPANDERS)
def test_components_differ_at_the_start(expander):
    config = head.HeadConfig(rank=2, predicted=2, expander=expander, expander_rank=4)
    params = head.init(jax.random.key(0), config, MODEL)
    h = jax.random.normal(jax.random.key(1), (5, 16))
    table = jax.random.normal(jax.random.key(2), (11, 16))
    out = jnp.stack([head.log_probs(params, config, h, s, table) for s in range(2)])
    flat = np.asarray(out).transpose(0, 2, 1, 3).reshape(4, -1)
    gaps = np.abs(flat[:, None] - flat[None]).max(-1)
    assert (gaps + np.eye(4) > 0.01).all()


def test_the_draft_vocabulary_is_the_frequent_tokens():
    config = head.HeadConfig(rank=2, predicted=1, draft_vocab=3)
    params = head.init(jax.random.key(0), config, MODEL)
    counts = np.array([0, 9, 1, 0, 7, 0, 0, 0, 0, 0, 8])
    params = head.with_vocab(params, counts)
    np.testing.assert_array_equal(params["vocab"]["ids"], [1, 4, 10])
    h, table = jnp.ones((1, 16)), jax.random.normal(jax.random.key(2), (11, 16))
    out = head.log_probs(params, config, h, 0, table)
    assert set(np.flatnonzero(np.isfinite(out[0, 0]))) == {1, 4, 10}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank": 0}, "head.rank=0 must be at least 1"),
        ({"predicted": 0}, "head.predicted=0 must be at least 1"),
        ({"transition": "none"}, "head.transition='none' is not one of"),
        ({"expander": "linear"}, "head.expander='linear' is not one of"),
        ({"expander_rank": 0}, "head.expander_rank=0 must be at least 1"),
        ({"noise": -1.0}, "head.noise=-1.0 must not be negative"),
        ({"draft_vocab": 12}, "head.draft_vocab=12 is not between 0 and .* 11"),
    ],
)
def test_impossible_heads_are_refused_in_one_line(change, reason):
    with pytest.raises(UserError, match=reason) as error:
        head.init(jax.random.key(0), head.HeadConfig(**change), MODEL)
    assert "\n" not in str(error.value)
