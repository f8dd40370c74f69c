# SPDX-License-Identifier: Apache-2.0
"""Verified drafts give the text of plain decoding; and heads that share a store give what lists of
their own do."""

import dataclasses

import jax
import numpy as np
import pytest

from lm.config import SamplingConfig
from lm.draft_inference import speculate
from lm.draft_inference.draft import FirstLayers
from lm.errors import UserError
from tests.lm.draft_inference.small import methods
from tests.lm.long_context.small import GREEDY, MODEL, assert_same, params, prompts, run

DRAWN = SamplingConfig(temperature=0.8, top_k=20, max_new_tokens=12)


def verified(method, sampling, stops=(), **options):
    return speculate.generations(
        MODEL, params(), prompts(), sampling, method, stops, jax.random.key(0), **options
    )


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_verified_drafts_do_not_change_the_text(sampling):
    """Of all the target's layers, which write what a whole cache gives, and of a store that heads
    share."""
    method = dataclasses.replace(methods().make("ada_speckv", 40), drafter=FirstLayers(2))
    plain, _ = run(method, sampling)
    stops = tuple(sorted({int(plain[1].tokens[7]), int(plain[2].tokens[2])}))
    plain, counted = run(method, sampling, stops)
    got, found = verified(method, sampling, stops)
    assert_same(got, plain)
    assert sum(g.stopped for g in got) >= 1
    assert (found.accepted <= found.drafted).all()
    if sampling is GREEDY:
        keeps = dataclasses.replace(method.keeps, shared=False)
        lists, others = run(dataclasses.replace(method, keeps=keeps), sampling, stops)
        assert_same(plain, lists)
        np.testing.assert_array_equal(counted.reads, others.reads)
    drawn = [len(g.tokens) + g.stopped for g in got]
    assert (drawn <= found.accepted + 1 + found.steps).all()
    if sampling is GREEDY:
        # the first pass alone verifies, then the target goes on token by token
        once, early = verified(method, sampling, stops, block=0)
        assert_same(once, plain)
        assert (found.accepted >= early.accepted).all()
        assert early.steps == max(
            len(g.tokens) - a - 1 + g.stopped for g, a in zip(got, early.accepted, strict=True)
        )
        # a whole prompt is kept: all that is drafted holds, up to the end of the text
        assert early.accepted[[0, 2]].tolist() == [min(len(plain[i].tokens), 6) for i in (0, 2)]


@pytest.mark.parametrize("name", ["speckv", pytest.param("speckv_pc", marks=pytest.mark.slow)])
def test_methods_go_on_as_they_can(name):
    """With all that is drafted right; and a compressed prompt, which the draft knows as it was."""
    method = methods().make(name, 60 if name == "speckv" else 40)
    if name == "speckv":
        method = dataclasses.replace(method, drafter=FirstLayers(2))
    plain, _ = run(method)
    got, found = verified(method, GREEDY)
    assert_same(got, plain)
    if name == "speckv":  # 6 drafted tokens and one of the target's own, 4 and another
        assert found.accepted.tolist() == [10] * 4
        assert found.steps == 1


def test_what_cannot_be_verified():
    with pytest.raises(UserError, match="only tokens that follow a prompt in the target"):
        verified(methods().make("specpc", 40), GREEDY)
    short = SamplingConfig(max_new_tokens=4)
    with pytest.raises(UserError, match="6 drafted tokens are more than the 4"):
        verified(methods().make("speckv", 40), short)
