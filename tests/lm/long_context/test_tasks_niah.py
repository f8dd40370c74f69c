# SPDX-License-Identifier: Apache-2.0
"""Needles in haystacks: how many there are, of what, where, and that each answer stands once."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.long_context import tasks, words
from lm.long_context.tasks import haystacks
from lm.long_context.tasks.niah import VARIANTS

NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+(?: \S+)*?) is: ([^.\s]+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
ESSAY_TEXT = "A first sentence stands here. Is a second one longer than it? Yes!"
ESSAY = tuple(ESSAY_TEXT.split())
PLAIN = [name for name, variant in VARIANTS.items() if variant.haystack != "essay"]


def make(name, size=60, seed=0, questions=1, essay=()):
    request = tasks.Request(4096, len, 0, questions, essay)
    return tasks.find(name).generate(random.Random(seed), size, request)


def body(document):
    """The lines of the haystack."""
    return document.context.splitlines()[1:]


def essay_for(name):
    return ESSAY if VARIANTS[name].haystack == "essay" else ()


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=15, deadline=None)
@given(size=st.integers(20, 90), seed=st.integers(0, 9999))
def test_counts_and_ranges(name, size, seed):
    variant = VARIANTS[name]
    document = make(name, size, seed, essay=essay_for(name))
    found = NEEDLE.findall(document.context)
    hidden = max(variant.num_keys, variant.num_queries) * variant.num_values
    others = size if variant.haystack == "needles" else 0
    assert len(found) == hidden + others
    assert {kind for kind, _, _ in found} == {variant.values}
    assert len({key for _, key, _ in found}) == len(found) // variant.num_values
    assert len({value for _, _, value in found}) == len(found)
    for _, key, value in found:
        if variant.keys == "uuids":
            assert UUID.fullmatch(key)
        else:
            assert any(
                key[:i] in words.listed("adjective") and key[i + 1 :] in words.listed("noun")
                for i, letter in enumerate(key)
                if letter == "-"
            )
        if variant.values == "uuids":
            assert UUID.fullmatch(value)
        else:
            assert 1_000_000 <= int(value) <= 9_999_999


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=15, deadline=None)
@given(size=st.integers(20, 90), seed=st.integers(0, 9999))
def test_the_answers_are_the_values_of_the_keys_asked_for(name, size, seed):
    variant = VARIANTS[name]
    document = make(name, size, seed, essay=essay_for(name))
    (question,) = document.questions
    found = NEEDLE.findall(document.context)
    asked = [key for key in dict.fromkeys(key for _, key, _ in found) if key in question.text]
    assert len(asked) == variant.num_queries
    expected = {value for _, key, value in found if key in asked}
    assert set(question.outputs) == expected
    assert len(question.outputs) == variant.num_queries * variant.num_values
    for output in question.outputs:
        assert document.context.count(output) == 1
        assert output not in question.text + question.prefix
    assert tasks.find(name).score(question.answer, question.outputs) == 1.0


@pytest.mark.parametrize("name", PLAIN)
def test_lines_are_noise_or_needles(name):
    lines = body(make(name, 50))
    variant = VARIANTS[name]
    noise = [line for line in lines if line == haystacks.NOISE]
    assert len(noise) == (0 if variant.haystack == "needles" else 50)
    assert all(NEEDLE.fullmatch(line) for line in lines if line != haystacks.NOISE)


def test_every_place_among_lines_occurs():
    places = {
        [line != haystacks.NOISE for line in body(make("niah_single_1", 6, seed))].index(True)
        for seed in range(100)
    }
    assert places == set(range(6))  # before each of the lines


def test_a_smallest_haystack_holds_its_needles():
    for name in PLAIN:
        task = tasks.find(name)
        document = make(name, task.smallest)
        assert all(output in document.context for output in document.questions[0].outputs)


def test_essays():
    sentences = [f"Sentence number {i} is here." for i in range(400)]
    essay = tuple(" ".join(sentences).split())
    depths = set()
    for seed in range(60):
        document = make("niah_multikey_1", 2000, seed, essay=essay)
        text = document.context.split("\n")[1]
        assert len(NEEDLE.findall(text)) == 4
        rest = NEEDLE.sub("", text).split()
        assert rest == list(essay)
        for needle in NEEDLE.finditer(text):
            before = NEEDLE.sub("", text[: needle.start()]).split()
            assert len(before) % 5 == 0  # between sentences
            depths.add(len(before) // 5)
    assert depths <= {400 * round(100 * i / 39) // 100 for i in range(40)}
    assert len(depths) == 40


def test_a_short_essay_is_repeated():
    text = make("niah_single_2", 100, essay=ESSAY).context.split("\n")[1]
    assert NEEDLE.sub("", text).split() == list(ESSAY * 10)[:100]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [20, 200])
def test_several_questions_have_answers_of_their_own(name, size):
    variant = VARIANTS[name]
    document = make(name, size, questions=6, essay=essay_for(name))
    wanted = {"niah_multivalue": 5}.get(name, 6) if size == 20 else 6
    assert len(document.questions) == wanted
    assert len({question.text for question in document.questions}) == wanted
    known = {}
    for _, key, value in NEEDLE.findall(document.context):
        known.setdefault(key, []).append(value)
    for question in document.questions:
        asked = [key for key in known if key in question.text]
        assert {v for key in asked for v in known[key]} == set(question.outputs)
        assert len(question.outputs) == variant.num_values * variant.num_queries


def test_wording_agrees_with_the_number_of_answers():
    (question,) = make("niah_single_1").questions
    assert " number is " in question.text
    (question,) = make("niah_multiquery").questions
    assert " numbers are " in question.text
    assert question.text.count(", ") == 3
    assert ", and " in question.text
