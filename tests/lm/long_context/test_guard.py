# SPDX-License-Identifier: Apache-2.0
"""Dense steps beside selected ones: what is reported, and what falling back gives."""

import dataclasses

import numpy as np

from lm.token_select.method import TokenSelect
from tests.lm.long_context.small import LENGTHS, MODEL, assert_same, dense, run
from tests.lm.token_select.small import SELECT

# the prompt is read whole, so a step's dense twin is plain generation
PLAIN = dataclasses.replace(SELECT, prefill="dense", k=4)


def test_reports_change_nothing():
    policy = TokenSelect(dataclasses.replace(SELECT, guard_every=3))
    got, statistics = run(policy)
    assert_same(got, run(TokenSelect(SELECT))[0], atol=1e-5)
    found = statistics.guard
    assert found["checks"].tolist() == [3] * 4  # steps 3, 6 and 9 of 11
    assert found["disagreements"][0] == 0  # nothing to skip
    assert 0 < found["disagreements"].sum() < 12
    np.testing.assert_allclose(found["kl"][0], 0, atol=1e-4)
    assert np.all(found["kl"][1:] > 1e-3)
    summary = statistics.summary(policy)["guard"]
    assert summary["checks"] == 12
    assert summary["dense_steps"] == 0
    assert statistics.reads.max() <= 11 * SELECT.budget  # checks alone are not what decoding takes


def test_falling_back_at_every_step_is_plain_generation():
    """A check that agrees keeps the selected step, whose best token is the dense one's."""
    policy = TokenSelect(dataclasses.replace(PLAIN, guard_every=1, guard="fallback"))
    got, statistics = run(policy)
    found = statistics.guard
    assert found["dense_steps"].sum() == found["disagreements"].sum() > 0
    agreed = found["disagreements"] == 11
    same = [a.tokens.tolist() == b.tokens.tolist() for a, b in zip(got, dense(), strict=True)]
    # what selected steps wrote into the cache may turn a later token, the first is always dense
    assert all(a.tokens[1] == b.tokens[1] for a, b in zip(got, dense(), strict=True))
    assert all(np.array(same)[agreed])
    assert sum(same) >= 2
    for b in np.flatnonzero(agreed):  # dense at every step, each after a selected one
        totals = range(LENGTHS[b] + 1, LENGTHS[b] + 12)
        taken = sum(totals) + sum(min(n, PLAIN.budget) for n in totals)
        assert statistics.reads[:, b].tolist() == [taken] * MODEL.num_layers
    assert statistics.summary(policy)["tokens_read"] > PLAIN.budget
