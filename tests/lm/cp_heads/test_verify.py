# SPDX-License-Identifier: Apache-2.0
"""The proof holds for heads of every kind, and fails when something is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import SamplingConfig
from lm.cp_heads import acceptance, losses, verify
from lm.cp_heads.drafters import Heads, Target
from lm.cp_heads.head import HeadConfig
from lm.errors import UserError
from tests.lm.cp_heads import counting

CONFIG = HeadConfig(rank=3, predicted=4, transition="linear", expander="mlp", draft_vocab=10)


@pytest.mark.parametrize(
    "config",
    [CONFIG, HeadConfig(rank=1, predicted=5), HeadConfig(rank=2, predicted=3, expander="direct")],
    ids=["hmm", "rank1", "direct"],
)
def test_the_likelihood_is_exact(config):
    loss, gradient = verify.likelihood_errors(verify.small_head(config), 0)
    assert loss < 1e-5
    assert gradient < 1e-4


def test_a_wrong_recursion_is_seen(monkeypatch):
    """A transition that is read the wrong way round."""
    right = losses.forward_beliefs

    def wrong(log_w, log_a, log_A, mask):
        return right(log_w, log_a, jnp.swapaxes(log_A, -1, -2), mask)

    monkeypatch.setattr(losses, "forward_beliefs", wrong)
    loss, gradient = verify.likelihood_errors(verify.small_head(CONFIG), 0)
    assert loss > 1e-3
    assert gradient > 1e-2


def test_a_wrong_token_is_counted(monkeypatch):
    right = acceptance.chain_greedy

    def wrong(tokens, best):
        accepted, token = right(tokens, best)
        return accepted, jnp.where(accepted == 3, (token + 1) % 16, token)

    monkeypatch.setattr(acceptance, "chain_greedy", wrong)
    config = HeadConfig(rank=3, predicted=4, expander="full")
    wrong_tokens, checked = verify.greedy_mismatches(
        Target(counting.MODEL, SamplingConfig(max_new_tokens=24)),
        counting.params_of(),
        Heads(config),
        counting.head_of(config),
        counting.prompts_of([3, 9, 1, 4]),
        (),
    )
    assert 0 < wrong_tokens < checked == 96


def test_findings_name_what_is_beyond_tolerance():
    fine = verify.Findings(1e-6, 1e-5, 1e-7, 0, 100)
    assert fine.problems() == []
    bad = verify.Findings(float("nan"), 1e-3, 2e-6, 3, 100)
    assert len(bad.problems()) == 4
    assert "loss_error nan exceeds 1e-05" in bad.problems()
    assert "3 of 100 greedy tokens differ from plain generation" in bad.problems()


def test_a_head_of_another_model_is_refused():
    config = HeadConfig(draft_vocab=17)
    with pytest.raises(UserError, match="draft_vocab=17"):
        verify.verify(counting.MODEL, counting.params_of(), config, {})


def test_prompts_are_repeated_or_random():
    target = Target(counting.MODEL, SamplingConfig(), valid_vocab=4)
    given = [np.array([1], np.int32), np.array([2], np.int32)]
    assert [int(p[0]) for p in verify._prompts(given, target, 5, 0)] == [1, 2, 1, 2, 1]
    random = verify._prompts((), target, 30, 0)
    assert len(random) == 30
    assert max(p.max() for p in random) == 3
    assert len({len(p) for p in random}) > 5
    assert jax.tree.all(jax.tree.map(lambda p: p.dtype == np.int32, random))
