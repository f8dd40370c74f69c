# SPDX-License-Identifier: Apache-2.0
"""APAR's forks in the threaded decoder: what it computes was trained, and it reads as the
answer."""

import jax
import numpy as np

from lm.async_decoding import baselines, critical_path, language, reading, threads
from lm.async_decoding.composed import Composition
from lm.async_decoding.language import Program, Promise, Text
from tests.lm.async_decoding.composed_programs import (
    END,
    PROMPT,
    SPEAKER,
    TOKENIZER,
    Run,
    check_logits,
    without,
)


def test_forks_are_decoded_as_they_were_trained():
    answer = Program(
        (Text("1. "), Promise("A", 10), Text("\n2. "), Promise("B", 10), Text("\nEnd")),
        ("A: tea.", "B: no sugar"),
    )
    program = baselines.encode(answer, PROMPT, TOKENIZER, END, "apar")
    assert program.num_blocks == 2
    rules = threads.Rules(13, 128, baselines.SCHEME, threads.APAR)
    run = Run.begun(Composition(), [program], rules=rules)
    expected = without(program, (), baselines.SCHEME)
    check_logits(run, program, expected)
    host = jax.device_get(run.state.threads)
    found = reading.answer(host, 0, "", np.zeros(0, np.int32), SPEAKER, form=threads.APAR)
    assert found.text == language.render(answer)
    assert found.finished
    assert found.steps == critical_path.critical_path(program)
    assert found.decoded == critical_path.timeline(program).decoded
    told = "".join(text for _, text in reading.final(host, 0, SPEAKER, threads.APAR))
    assert told == found.text


def test_what_can_be_read_ends_in_the_first_unfinished_block():
    ids = language.tag_ids(TOKENIZER)
    fork, child, close = (ids[tag] for tag in (baselines.FORK, baselines.CHILD, baselines.CLOSE))
    encode = TOKENIZER.encode
    main = [*encode("a").tolist(), fork, *encode("b").tolist(), fork, *encode("c").tolist()]
    first = [child, *encode("1").tolist()]
    second = [child, *encode("2").tolist(), close]

    def told(blocks, ended):
        found = baselines.final_segments([main, *blocks], ended, TOKENIZER, TOKENIZER.stop_ids)
        return "".join(text for _, text in found)

    assert told([], [False]) == "a"
    assert told([first, second], [False, False, True]) == "a1"
    assert told([[*first, close], second[:-1]], [False, True, False]) == "a1b2"
    assert told([[*first, close], second], [False, True, True]) == "a1b2c"
