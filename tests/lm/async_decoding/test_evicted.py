# SPDX-License-Identifier: Apache-2.0
"""A thinned prompt is what threads see of it, whoever chose: an evictor, or a draft's tokens."""

import jax
import pytest

from lm.async_decoding import evicted
from lm.async_decoding.evicted import Thinned
from lm.config import SamplingConfig
from lm.draft_inference.draft import FirstLayers
from lm.draft_inference.method import Drafted
from lm.draft_inference.speckv import SpecKV
from lm.errors import UserError
from lm.long_context import decode
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


def test_main_on_a_prompt_that_a_draft_thinned():
    """The model's own choice, beside decoding after the same method, token by token; layers and KV
    heads keep different tokens."""
    method = Drafted(FirstLayers(1), SpecKV(8, window=2, kernel=3), lookahead=3)
    run = Run.begun(Thinned(method, SPEAKER.stop_ids), [answer()], free="all")
    assert run.state.threads.slots.tolist() == [9]  # the last token was fed again
    while int(run.state.threads.step) < 24 and not run.finished():
        run.step()
    found, _ = decode.decode(
        SPEAKER.model,
        SPEAKER.params,
        [PROMPT],
        SamplingConfig(temperature=0.0, max_new_tokens=24),
        method,
        SPEAKER.stop_ids,
        jax.random.key(0),
        valid_vocab=SPEAKER.valid_vocab,
    )
    count = int(run.state.threads.rows.count[0, 0])
    assert count >= 8
    written = run.state.threads.main.tokens[0, :count].tolist()
    assert written == found[0].tokens.tolist()[:count]


def test_heads_that_keep_unequal_numbers_are_refused():
    method = Drafted(FirstLayers(1), SpecKV(8, window=2, coverage=0.5), lookahead=3)
    with pytest.raises(UserError, match="unequal"):
        Run.begun(Thinned(method), [answer()])
