# SPDX-License-Identifier: Apache-2.0
"""A thinned prompt is what threads see of it, whoever chose: an evictor, or a draft's tokens."""

import jax
import numpy as np
import pytest

from lm.async_decoding import evicted, verify_pool
from lm.async_decoding.composed import Composition
from lm.async_decoding.evicted import Thinned
from lm.config import SamplingConfig
from lm.draft_inference.draft import FirstLayers
from lm.draft_inference.method import Drafted
from lm.draft_inference.speckv import SpecKV
from lm.errors import UserError
from lm.long_context import decode
from lm.long_context.program import Program
from tests.lm.async_decoding.composed_programs import (
    PROMPT,
    RULES,
    SPEAKER,
    Run,
    answer,
    check_logits,
    without,
)


def test_threads_on_a_thinned_prompt():
    program, evictor = answer(), evicted.build("streaming_llm", 6)
    run = Run.begun(Thinned(evictor), [program])
    assert run.state.threads.slots.tolist() == [6]
    sinks = evictor.sinks
    check_logits(run, program, without(program, range(sinks, len(PROMPT) - 6 + sinks)))


def test_a_prompt_that_a_draft_thinned():
    """What is prefilled is what decoding after the same method prefills, and the pool holds the
    prompt's own entries; layers and KV heads keep different ones."""
    method = Drafted(FirstLayers(1), SpecKV(8, window=2, kernel=3), lookahead=3)
    run = Run.begun(Thinned(method, SPEAKER.stop_ids), [answer()], free="all")
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=24)
    program = Program(SPEAKER.model, sampling, method, valid_vocab=SPEAKER.valid_vocab)
    stops, key = SPEAKER.stop_ids, jax.random.key(0)
    program, request = decode.request(program, [PROMPT], stops, key, None)
    request = method.ahead(program, SPEAKER.params, request)
    _, _, *prompt = verify_pool.arguments(SPEAKER, [answer()], RULES)
    given = run.composition.ahead(run.static, SPEAKER.params, *prompt)
    for mine, theirs in zip(given, (request.tokens, request.lengths, request.rows), strict=True):
        assert mine.tolist() == theirs.tolist()
    assert run.state.threads.slots.tolist() == [9]  # the last token was fed again
    assert run.state.threads.rows.position[0, 0] == len(PROMPT)
    whole = Run.begun(Composition(), [answer()], free="all").state.pool
    kept = set()
    for layer, head in np.ndindex(2, 2):
        here, there = (np.asarray(one.k)[layer, 0, :, head] for one in (run.state.pool, whole))
        same = np.abs(here[:8, None] - there[None, : len(PROMPT) - 1]).max(axis=-1) < 1e-5
        slots = np.flatnonzero(same.any(axis=0)).tolist()
        assert same[np.arange(8), slots].all()  # each its own, in order
        assert slots[-2:] == [len(PROMPT) - 3, len(PROMPT) - 2]  # the window
        kept.add(tuple(slots))
        if not layer:  # the token that was fed again has read nothing there yet
            np.testing.assert_allclose(here[8], there[len(PROMPT) - 1], rtol=0, atol=1e-6)
    assert len(kept) > 1


def test_heads_that_keep_unequal_numbers_are_refused():
    method = Drafted(FirstLayers(1), SpecKV(8, window=2, coverage=0.5), lookahead=3)
    with pytest.raises(UserError, match="unequal"):
        Run.begun(Thinned(method), [answer()])
