# SPDX-License-Identifier: Apache-2.0
"""Every other task by its published counts and ranges; answers are recomputed from the text
alone."""

import collections
import functools
import itertools
import json
import math
import random
import re
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.long_context import tasks
from lm.long_context.tasks import haystacks
from lm.long_context.tasks.reckoning import LAYERS, STATISTICS, VALUES

SEEDS = st.integers(0, 9999)
ASSIGNMENT = re.compile(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))")
drawn = functools.partial(settings, max_examples=20, deadline=None)


def make(name, size, seed=0, length=4096, index=0, questions=1, count=len):
    request = tasks.Request(length, count, index, questions)
    return tasks.find(name).generate(random.Random(seed), size, request)


def test_every_task_is_there():
    assert {"vt", "cwe", "fwe", "passkey", "number_string", "kv_retrieval"} <= tasks.TASKS.keys()
    assert {"math_find", "math_calc", "code_run"} <= tasks.TASKS.keys()
    assert len([name for name in tasks.TASKS if name.startswith("niah_")]) == 8
    with pytest.raises(UserError, match=r"unknown task 'nope'; known: niah_single_1, .*code_run"):
        tasks.find("nope")


@pytest.mark.parametrize("name", tasks.TASKS)
def test_same_seed_same_document_and_perfect_answers_score_1(name):
    task = tasks.find(name)
    essay = ("Words.",) if task.essay == "must" else ()
    for index in range(8):
        request = tasks.Request(4096, len, index, 1, essay)
        first, second, other = (
            task.generate(random.Random(f"{seed}{index}"), max(task.smallest, 40), request)
            for seed in (1, 1, 2)
        )
        assert first == second
        assert first != other
        assert "{" not in first.questions[0].text + first.questions[0].prefix
        question = first.questions[0]
        assert task.score(question.answer, question.outputs) == 1.0
        assert task.score(" none of it", question.outputs) == 0.0


# --- variable tracking


def worth(text):
    """Variable -> its number, by following assignments in the order of the text."""
    known = {}
    for name, other, number in ASSIGNMENT.findall(text):
        assert name not in known
        known[name] = known[other] if other else int(number)
    return known


@drawn()
@given(size=st.integers(5, 60), seed=SEEDS)
def test_vt(size, seed):
    document = make("vt", size, seed)
    example, text = document.context.split("\n\n")
    assert text.count(haystacks.NOISE) == size
    known = worth(text)
    assert len(known) == 5
    assert all(len(name) == 5 and name.isupper() for name in known)
    (value,) = set(known.values())
    assert 10000 <= value <= 99998
    (question,) = document.questions
    assert str(value) in question.text
    assert question.outputs == tuple(known)  # in the order of the chain
    # the example: names of three letters, another chain, solved
    solved = worth(example)
    assert len(solved) == 5
    assert all(len(name) == 3 for name in solved)
    assert example.rstrip().endswith(" ".join(solved))
    assert not known.keys() & solved.keys()


def test_vt_examples_have_at_most_500_tokens_or_their_smallest_form():
    def words_of(text):
        return len(text.split())

    longest = 0
    for seed in range(20):
        example = make("vt", 5, seed, count=words_of).context.split("\n\n")[0]
        longest = max(longest, words_of(example))
        assert words_of(example) <= 500
    assert longest > 500 - 20  # another line of noise would not fit
    # in characters not even five lines of noise fit
    example = make("vt", 5).context.split("\n\n")[0]
    assert example.count(haystacks.NOISE) == 5
    examples = {make("vt", 5, seed).context.split("\n\n")[0] for seed in range(10)}
    assert len(examples) == 10


def test_vt_with_several_chains():
    document = make("vt", 40, questions=3)
    known = worth(document.context.split("\n\n")[1])
    assert len(known) == 15
    for question in document.questions:
        (value,) = {known[name] for name in question.outputs}
        assert str(value) in question.text
        assert {name for name in known if known[name] == value} == set(question.outputs)


# --- frequencies


def numbered(text):
    """Word -> count, of a numbered list."""
    found = re.findall(r"(\d+)\. (.*?)(?= \d+\. |$)", text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return collections.Counter(word for _, word in found)


@pytest.mark.parametrize(
    ("length", "common", "uncommon", "example"),
    [(4096, 30, 3, (40, 10, 3)), (4095, 6, 1, (20, 3, 1))],
)
@pytest.mark.parametrize("size", [11, 100, 9000])
def test_cwe(length, common, uncommon, example, size):
    document = make("cwe", size, length=length)
    lines = document.context.splitlines()
    shown, counts = numbered(lines[1]), numbered(lines[6])
    assert len(counts) == size
    assert sorted(set(counts.values())) == sorted({common, uncommon})
    (question,) = document.questions
    assert len(question.outputs) == 10
    assert {word for word, times in counts.items() if times == common} == set(question.outputs)
    words, often, seldom = example
    assert collections.Counter(shown.values()) == {often: 10, seldom: words - 10}
    answered = {word for word, times in shown.items() if times == often}
    assert set(lines[3].rsplit(": ", 1)[1].split(", ")) == answered
    # the lists end before 9,000 words
    assert any(word.startswith("word_") for word in counts) == (size == 9000)


@drawn()
@given(size=st.integers(73, 4000), seed=SEEDS, length=st.integers(300, 9000))
def test_fwe(size, seed, length):
    document = make("fwe", size, seed, length)
    counts = collections.Counter(document.context.splitlines()[1].split())
    num_words = max((length - 50) // 50, 4)
    zeta = math.pi**2 / 6
    expected = [int(size / i**2 / zeta) for i in range(1, num_words + 1)]
    assert sorted(counts.values(), reverse=True) == [times for times in expected if times]
    (noise, *ranked) = counts.most_common(4)
    assert noise[0] == "..."
    (question,) = document.questions
    assert set(question.outputs) == {word for word, _ in ranked}
    assert [counts[word] for word in question.outputs] == expected[1:4]
    assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")


# --- keys


@drawn()
@given(size=st.integers(1, 200), seed=SEEDS, index=st.integers(0, 200))
def test_passkey(size, seed, index):
    document = make("passkey", size, seed, index=index)
    assert document.context.count(haystacks.NOISE) == size
    (key,) = document.questions[0].outputs
    assert re.fullmatch("[0-9]{5}", key)
    assert document.context.count(key) == 2
    assert len(re.findall("[0-9]+", document.context)) == 2


@pytest.mark.parametrize("name", ["passkey", "number_string"])
def test_59_samples_take_59_depths(name):
    places = []
    for index in range(2 * 59):
        lines = make(name, 580, index=index).context.splitlines()[1:]
        (place,) = [i for i, line in enumerate(lines) if line != haystacks.NOISE]
        places.append(place)
    assert sorted(places) == sorted(2 * [10 * depth for depth in range(59)])
    assert all(abs(a - b) > 100 for a, b in itertools.pairwise(places))


@drawn()
@given(seed=SEEDS)
def test_number_string(seed):
    document = make("number_string", 20, seed)
    (number,) = document.questions[0].outputs
    assert re.fullmatch("[0-9]{10}", number)
    # five doublings of a neighbour leave at least five equal neighbours
    assert sum(a == b for a, b in itertools.pairwise(number)) >= 5
    assert document.context.count(number) == 2


@drawn()
@given(size=st.integers(1, 100), seed=SEEDS, index=st.integers(0, 600))
def test_kv_retrieval(size, seed, index):
    document = make("kv_retrieval", size, seed, index=index)
    pairs = json.loads(document.context.splitlines()[1])
    assert len(pairs) == size
    (question,) = document.questions
    (key,) = re.findall(r'"([0-9a-f-]{36})"', question.text)
    assert question.outputs == (pairs[key],)
    assert document.context.count(pairs[key]) == 1
    assert document.context.count(key) == 1
    assert list(pairs).index(key) == index * 309 % 500 * size // 500


def test_500_samples_ask_for_every_place_alike():
    places = collections.Counter()
    for index in range(500):
        document = make("kv_retrieval", 20, index=index)
        places[document.context.index(document.questions[0].outputs[0])] += 1
    assert list(places.values()) == [25] * 20


def test_kv_with_several_questions():
    document = make("kv_retrieval", 10, questions=30)
    pairs = json.loads(document.context.splitlines()[1])
    assert {question.outputs[0] for question in document.questions} == set(pairs.values())


# --- reckoning


@drawn(max_examples=60)
@given(size=st.integers(5, 120), seed=SEEDS, index=st.integers(0, 20))
def test_math_find(size, seed, index):
    document = make("math_find", size, seed, index=index)
    numbers = json.loads(document.context.splitlines()[1])
    asked, _, before = STATISTICS[index % 7]
    assert size - (before is None) <= len(numbers) <= size
    assert all(0 <= number <= 99 for number in numbers)
    different = sorted(set(numbers))
    expected = {
        "largest": lambda: different[-1],
        "second largest": lambda: different[-2],
        "third largest": lambda: different[-3],
        "smallest": lambda: different[0],
        "second smallest": lambda: different[1],
        "third smallest": lambda: different[2],
        "median": lambda: statistics.median(numbers),
    }[asked]()
    (question,) = document.questions
    assert f" {asked} number" in question.text
    assert question.outputs == (str(expected),)
    assert ("count once" in question.text) == asked.startswith(("second", "third"))


@drawn()
@given(st.integers(2, 200), SEEDS)
def test_math_calc(size, seed):
    document = make("math_calc", size, seed)
    (question,) = document.questions
    first, *rest = document.context.splitlines()[1].split()
    values = [int(first)]
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        values.append(values[-1] + {"+": 1, "-": -1}[sign] * int(term))
    assert len(values) == size
    assert all(0 <= value <= 99 for value in values)
    assert list(map(int, question.outputs)) == values[:VALUES]
    score = tasks.find("math_calc").score
    assert score(question.answer, question.outputs) == 1
    assert score(f"{values[0]}, 100, {values[1]}", question.outputs) == 1 / len(question.outputs)


def test_math_find_answers_vary():
    for index in range(7):
        answers = {
            make("math_find", 2001, seed, index=index).questions[0].outputs for seed in range(30)
        }
        assert len(answers) > 10


@drawn()
@given(size=st.integers(10, 120), seed=SEEDS, index=st.integers(0, 10), asked=st.integers(1, 4))
def test_code_run(size, seed, index, asked):
    document = make("code_run", size, seed, index=index, questions=asked)
    code = document.context.split("\n", 1)[1]
    lines = code.split("\n")[:-1]
    assert len(lines) == size
    offsets = [int(f"{sign}{number}") for sign, number in re.findall(r" ([+-]) (\d+)$", code, re.M)]
    assert len(offsets) == size
    assert min(offsets) >= -12
    assert max(offsets) <= 17
    functions = {}
    exec(code, functions)
    calls = dict(re.findall(r"def (func_\d+)\(x\): return (func_\d+)\(x\)", code))
    depth = LAYERS[index % 5]
    assert 1 <= len(document.questions) <= asked
    for question in document.questions:
        call, name, argument = re.search(r"((func_\d+)\((-?\d+)\))", question.text).groups()
        assert -10 <= int(argument) <= 10
        assert question.outputs == (str(eval(call, functions)),)
        chain = [name]
        while chain[-1] in calls:
            chain.append(calls[chain[-1]])
        assert len(chain) == depth
