# SPDX-License-Identifier: Apache-2.0
"""The verification finds nothing where there is nothing, and what there is where there is."""

import dataclasses

import pytest

from lm.errors import UserError
from lm.long_context import cache, decode, exact
from lm.long_context.policy import Dense
from lm.token_select import verify
from tests.lm.long_context.small import GREEDY, MODEL, params
from tests.lm.token_select.small import SELECT

STEPS = 8
CONFIG = dataclasses.replace(SELECT, shadow="int8", reuse=0.5)


@pytest.fixture(scope="module")
def found():
    return verify.verify(MODEL, params(), CONFIG, steps=STEPS)


@pytest.mark.slow  # the command is tested
def test_nothing_is_wrong(found):
    assert found.problems() == []
    assert found.tokens == 5 * CONFIG.budget // 2 + STEPS
    assert found.cut > CONFIG.k
    assert found.steps == 4 * STEPS
    assert max(found.dense_error, found.chunk_error, found.ragged_error) < 1e-5
    assert found.overlaps == {"xla": 1.0}
    assert 0.5 < found.shadow_overlap <= 1
    assert found.problems(tolerance=1e-9)  # they are measured, not assumed
    assert "exceeds 0" in found.problems(tolerance=0)[0]


def test_a_selection_that_is_kept_while_a_text_grows_to_n_init_is_dense_attention():
    config = dataclasses.replace(SELECT, n_init=6)
    texts = verify.random_texts(MODEL, config, STEPS, None, 1)[-1:]
    assert len(texts[0]) > config.n_init
    found = verify.verify(MODEL, params(), config, texts=texts, steps=STEPS)
    assert found.dense_error < 1e-5


def test_a_prompt_that_loses_a_token_is_found(monkeypatch):
    """Its own token, in a layer that reads one less: the chunks that are compared are wrong."""
    attention = cache.cached_attention

    def loses(q, k, v, *, lengths, **options):
        return attention(q, k, v, lengths=lengths - (lengths > 24), **options)

    monkeypatch.setattr(cache, "cached_attention", loses)
    texts = verify.random_texts(MODEL, SELECT, STEPS, None, 1)[:1]
    policy = Dense(SELECT.chunk)
    program = decode.Program(MODEL, GREEDY, policy, 64)
    wanted = [exact.logits(MODEL, params(), texts[0], 64)]
    got, _ = verify._logits(program, params(), policy, texts, STEPS, False)
    error = exact.error(got, [wanted[0][: len(got[0])]])
    assert error > 100 * verify.TOLERANCES["chunk_error"]


def test_texts_must_leave_a_prompt():
    texts = verify.random_texts(MODEL, SELECT, STEPS, None, 0)
    with pytest.raises(UserError, match="a text of 8 tokens leaves none before 8 steps"):
        verify.verify(MODEL, params(), SELECT, texts=[texts[0][:8]], steps=STEPS)
