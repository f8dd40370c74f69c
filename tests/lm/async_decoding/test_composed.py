# SPDX-License-Identifier: Apache-2.0
"""Answers that are drawn under a composition: nothing but what is dropped of a prompt changes
them."""

import numpy as np
import pytest

from lm.async_decoding import composed, decode, evicted
from lm.async_decoding.composed import Composition
from lm.async_decoding.evicted import Thinned
from tests.lm.async_decoding.composed_programs import SPEAKER

SETTINGS = decode.Settings(max_tokens=24, temperature=1.0, threads=3)
PROMPTS = [np.arange(40 + n, 60 + n, dtype=np.int32) for n in range(3)]


def drawn(composition, prompts=PROMPTS, **options):
    pieces = None if composition is None else composed.pieces(composition, ())
    rules = SETTINGS.rules("predicted")
    found = decode.speak(SPEAKER, rules, SETTINGS, prompts, 5, pieces=pieces, **options)
    return [[thread.ids.tolist() for thread in answer.threads] for answer in found]


@pytest.fixture(scope="module")
def alone():
    return drawn(None)


@pytest.mark.parametrize(
    "composition", [Composition(), *(Thinned(evicted.build("snapkv", n)) for n in (20, 64))]
)
def test_what_drops_nothing_changes_nothing(composition, alone):
    assert drawn(composition) == alone


def test_a_thinned_prompt_gives_other_answers_whatever_the_batch(alone):
    thin = Thinned(evicted.build("streaming_llm", 12))
    ragged = [*PROMPTS, np.arange(70, 97, dtype=np.int32)]
    found = drawn(thin, ragged, batch=4)
    assert found == drawn(thin, ragged, batch=3)  # two batches
    assert found[:3] != alone
