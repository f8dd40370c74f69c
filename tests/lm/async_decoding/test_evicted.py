# SPDX-License-Identifier: Apache-2.0
"""A thinned prompt is what threads see of it, whoever chose: an evictor, or a draft's tokens."""

import jax
import numpy as np
import pytest

from lm.async_decoding import evicted
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
    """The pool begins with what decoding after the same method begins with; layers and KV heads
    keep different tokens."""
    method = Drafted(FirstLayers(1), SpecKV(8, window=2, kernel=3), lookahead=3)
    run = Run.begun(Thinned(method, SPEAKER.stop_ids), [answer()], free="all")
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=24)
    program = Program(SPEAKER.model, sampling, method, valid_vocab=SPEAKER.valid_vocab)
    stops, key = SPEAKER.stop_ids, jax.random.key(0)
    program, request = decode.request(program, [PROMPT], stops, key, None)
    request = method.ahead(program, SPEAKER.params, request)
    state = decode.prefill(program, SPEAKER.params, *request)
    kept = state.cache.buffers
    held, threads = run.state.pool, run.state.threads
    assert threads.slots.tolist() == [9]  # the last token was fed again
    assert kept.counts.tolist() == [[[9, 9]], [[9, 9]]]
    for mine, theirs in ((held.k, kept.k), (held.v, kept.v)):
        theirs = np.swapaxes(theirs, 2, 3)
        np.testing.assert_allclose(mine[:, :, :9], theirs[:, :, :9], rtol=0, atol=1e-6)
    assert not np.array_equal(held.k[0, 0, :8, 0], held.k[0, 0, :8, 1])
    assert threads.rows.token[0, 0] == state.last[0]
    assert threads.rows.position[0, 0] == len(PROMPT)


def test_heads_that_keep_unequal_numbers_are_refused():
    method = Drafted(FirstLayers(1), SpecKV(8, window=2, coverage=0.5), lookahead=3)
    with pytest.raises(UserError, match="unequal"):
        Run.begun(Thinned(method), [answer()])
