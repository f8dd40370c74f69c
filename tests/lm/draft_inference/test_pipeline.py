# SPDX-License-Identifier: Apache-2.0
"""What was dropped adds up with what was kept, a rollback is dense, and the harness runs the
methods."""

import dataclasses

import jax
import numpy as np
import pytest

from lm.config import freeze
from lm.draft_inference import pipeline
from lm.draft_inference.config import DraftConfig
from lm.draft_inference.draft import Draft
from lm.draft_inference.methods import Methods
from lm.errors import UserError
from lm.long_context import evaluate, exact
from lm.long_context.judge import Judge
from lm.long_context.options import Budget, Options
from tests.lm.draft_inference.small import SETTINGS, methods
from tests.lm.long_context.small import GREEDY, MODEL, dense, params, prompts, run, speaker

K = MODEL.num_kv_heads


def audited(name):
    return pipeline.audit(
        MODEL, params(), prompts(), GREEDY, methods().make(name, 40), (), jax.random.key(0)
    )


def test_what_is_dropped_scores_below_what_is_kept():
    for found, n in zip(audited("speckv_pc"), (5, 60, 33, 47), strict=True):
        assert len(found.shown) == min(n, 44)
        assert len(found.drafted) == 6
        for layer in range(MODEL.num_layers):
            for head in range(K):
                slots, scores = found.dropped(layer, head)
                kept = found.kept[layer][head]
                assert len(slots) == max(min(n, 44) - 1 - 40, 0)
                assert sorted([*slots, *kept]) == found.shown[:-1].tolist()
                places = np.searchsorted(found.shown, kept[:-6])  # before the window
                if len(slots):
                    assert scores.max() <= found.scores[layer, head, places].min()


def test_an_audit_of_a_shortened_prompt():
    found = audited("specpc")[1]
    assert found.scores is None
    assert len(found.drafted) == 0
    assert len(found.shown) == 40
    assert found.importance.shape == (60,)
    assert {54, 55, 56, 57, 58, 59, int(found.importance.argmax())} <= set(found.shown.tolist())
    assert found.dropped(0, 0)[0].tolist() == []  # of what it saw it keeps all


def test_a_rollback_is_dense():
    made, _ = run(methods().make("speckv", 40))
    found = pipeline.rollback(MODEL, params(), prompts(), made, GREEDY, (), jax.random.key(0))
    for one, other, plain in zip(found, made, dense(), strict=True):
        assert one.dense.tokens.tolist() == plain.tokens.tolist()
        same = other.tokens.tolist() == plain.tokens.tolist()
        assert (one.parted is None) == same == (one.agreement == 1) == (one.edit_distance == 0)
        if not same:
            before = slice(0, one.parted)
            assert (other.tokens[before] == plain.tokens[before]).all()
            assert other.tokens[one.parted] != plain.tokens[one.parted]
    assert found[1].parted is not None
    with pytest.raises(UserError, match="1 answers to 4 prompts"):
        pipeline.rollback(MODEL, params(), prompts(), made[:1], GREEDY, (), jax.random.key(0))


def test_the_harness_evaluates_and_times_them():
    target = speaker()
    weights = exact.random_params(target.model, 3)
    drafter = Draft(target.model, weights, target.valid_vocab, "", "seed 3")
    table = Methods(SETTINGS, drafter)
    options = Options(
        methods=("speckv_pc", "random"), tasks=("passkey",), lengths=(340,), samples=1,
        budgets=("64",), batch_size=1, timed=True,
    )  # fmt: skip
    table = dataclasses.replace(table, settings=dataclasses.replace(SETTINGS, columns=360))
    judge = Judge(freeze({}, DraftConfig), table, options, target)
    (cell,) = judge.cells()
    plan = judge.plan(cell, [Budget.parse("64")])
    (found,) = evaluate.measured(judge, [cell], [plan])
    row = found["speckv_pc", 64][0]
    assert row["tokens_read"] > 64
    assert row["prefill_ms"] > 0
    assert row["budget"] == 64
    assert "Draft(seed 3, float32)" in repr(plan["speckv_pc", 64].policy)
    assert len({asked.key for asked in plan.values()}) == 3
