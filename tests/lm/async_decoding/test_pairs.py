# SPDX-License-Identifier: Apache-2.0
"""Samples as rows: an answer is trained on token by token as it was decoded, broken ones
included."""

import dataclasses

import numpy as np
import pytest

from lm.async_decoding import language, layout, pairs, programs, requests
from lm.async_decoding.answers import Thread
from tests.lm.async_decoding import scripted
from tests.lm.async_decoding.scripted import END, TOKENIZER

PROMPT = np.arange(5, dtype=np.int32)
STOPS = TOKENIZER.stop_ids
IDS = language.tag_ids(TOKENIZER)


def same(first, second):
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, tuple):
            assert len(a) == len(b)
            for one, other in zip(a, b, strict=True):
                np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_array_equal(a, b)


def test_decoded_answers_are_their_programs_again():
    for index in range(40):
        conversation = requests.generate(3, index)
        program = language.recounted(language.parse(conversation.messages[1].content), TOKENIZER)
        encoded = programs.encode(program, PROMPT, TOKENIZER, END)
        answer = scripted.answer_of_program("p", encoded)
        record = pairs.to_record(answer)
        again = pairs.from_record("p", record, TOKENIZER, STOPS)
        found = pairs.program_of(again, PROMPT, TOKENIZER, STOPS)
        assert not found.ends
        same(found.program, encoded)
        assert pairs.well_formed(again, TOKENIZER, STOPS)
        assert again.text == language.render(program)
        made, whole = pairs.layout_of(found, "predicted"), layout.layout_of(encoded, "predicted")
        np.testing.assert_array_equal(made.edge_children, whole.edge_children)


def thread(ids, forced=0):
    ids = np.array(ids, np.int32)
    return Thread(ids, forced, np.arange(1, len(ids) - forced + 1))


def promise(topic, number):
    return [IDS[language.PROMISE], *TOKENIZER.encode(topic), IDS[language.TOKENS],
            *TOKENIZER.encode(number), IDS[language.PROMISE_END]]  # fmt: skip


OPENING = [IDS[language.ASYNC], *TOKENIZER.encode("t"), IDS[language.ASYNC_BODY]]
CLOSE = IDS[language.ASYNC_END]


@pytest.mark.parametrize(
    ("main", "blocks", "ends", "tokens"),
    [
        # a block that ran into its cap: its end was written by the decoder
        ([*promise("t", "10"), END], [[*OPENING, *[70] * 20]], {0: None}, [10]),
        # one that was never closed, in an answer that was cut off
        ([*promise("t", "10"), 70, 71], [[*OPENING, 70, 71]], {0: None}, [10]),
        # and one that had not begun: main left room for it
        (
            [*promise("t", "10"), *promise("u", "30"), 70],
            [[*OPENING, 70, CLOSE]],
            {1: None},
            [10, 30],
        ),
        # an end of answer inside a block, a number that is none, a stray tag
        ([*promise("t", "0"), CLOSE, END], [[*OPENING, 70, END]], {0: END}, [10]),
        ([*promise("t", "7777777"), END], [[*OPENING, CLOSE]], {}, [1000]),
        # a promise that is not whole is text
        ([IDS[language.PROMISE], 70, IDS[language.SYNC], 71, END], [], {}, []),
    ],
)
def test_malformed_answers_keep_their_tokens_and_never_win(main, blocks, ends, tokens):
    answer = scripted.raw_answer("p", [thread(main), *(thread(b, 3) for b in blocks)])
    found = pairs.program_of(answer, PROMPT, TOKENIZER, STOPS)
    assert found.ends == ends
    assert found.program.tokens.tolist() == tokens
    assert not pairs.well_formed(answer, TOKENIZER, STOPS)
    made = pairs.layout_of(found, "predicted")
    # what came out is predicted, what was put there is not
    sampled = [*main, *(i for b in blocks for i in b[3:])]
    assert sorted(made.edge_targets.tolist()) == sorted(sampled)
    assert made.length == len(PROMPT) + len(main) + sum(found.program.lengths)
    assert END not in made.tokens[: made.length][len(PROMPT) + len(main) :]
    np.testing.assert_allclose(made.edge_turn_weights.sum(), 1, rtol=1e-6)
    plain = layout.layout_of(found.program, "predicted")
    np.testing.assert_array_equal(made.positions, plain.positions)


def test_threads_that_nobody_promised_have_no_program():
    answer = scripted.raw_answer("p", [thread([70, END]), thread([*OPENING, CLOSE], 3)])
    assert pairs.program_of(answer, PROMPT, TOKENIZER, STOPS) is None


def test_an_answer_that_was_cut_off_is_not_whole():
    whole = scripted.answer_of("p", "yes")
    assert pairs.well_formed(whole, TOKENIZER, STOPS)
    cut = dataclasses.replace(whole, finished=False)
    assert not pairs.well_formed(cut, TOKENIZER, STOPS)


def test_the_best_and_the_worst():
    def choose(speeds, may_win, may_lose):
        return pairs.choose([pairs.score(x, 0.0, 4.0) for x in speeds], may_win, may_lose)

    yes = [True] * 4
    assert choose([1.0, 3.0, 3.0, 0.5], yes, yes) == (1, 3)
    assert choose([1.0, 3.0, 3.0, 0.5], [True, False, False, True], yes) == (0, 3)
    assert choose([1.0, 3.0, 3.0, 0.5], yes, [True, True, True, False]) == (1, 0)
    assert choose([2.0] * 4, yes, yes) == "tied"
    assert choose([1.0, 9.0], [True, False], [True, False]) == "tied"
    assert choose([1.0, 2.0], [False, False], [True, True]) == "malformed"
    # what may win is worse than everything else: nothing to prefer it to
    assert choose([1.0, 2.0], [True, False], [False, True]) == "tied"
    assert pairs.score(1.5, 0.5, 4.0) == (3.5,)


@pytest.mark.parametrize(
    ("weight", "expected"), [(1.0, (2, 3)), (8.0, (1, 2)), (1e6, (0, 2)), (float("inf"), (0, 2))]
)
def test_a_weight_decides_between_quality_and_speed(weight, expected):
    """Infinite: as very large ones, quality first, then speed."""
    samples = [(2.0, 1.0), (2.5, 0.99), (4.0, 0.5), (1.5, 1.0)]  # (speed, quality)
    scores = [pairs.score(*one, weight) for one in samples]
    assert pairs.choose(scores, [True] * 4, [True] * 4) == expected


def test_rows_of_pairs_tell_the_two_apart():
    made = []
    for text in ('<promise topic="t" tokens="10"/>yes<async topic="t">no</async>', "yes"):
        answer = scripted.answer_of("p", text)
        found = pairs.program_of(answer, PROMPT, TOKENIZER, STOPS)
        made.append(pairs.layout_of(found, "fork_join_max"))
    row = pairs.row_of(*made, (-1.0, -2.0), 64)
    for name, own in zip(("chosen", "rejected"), made, strict=True):
        at = np.flatnonzero(row[name])
        np.testing.assert_array_equal(row["edge_targets"][at], own.edge_targets)
    batch = pairs.stacked([row], 3)
    assert batch["pair"].tolist() == [1, 0, 0]
    assert batch["reference"].shape == (3, 2)
    assert (batch["edge_targets"][1:] == -1).all()
    pair = pairs.Pair(3, 1, 0, (-1.5, -2.25))
    assert pairs.loads(pairs.dumps([pair, pair])) == [pair, pair]
