# SPDX-License-Identifier: Apache-2.0
"""Scorers against what they are defined as, judges, win rates, and the front."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from lm.async_decoding import front, judge, quality, requests
from lm.async_decoding.assembly import Assembly
from lm.async_decoding.endpoint import Endpoint, EndpointConfig, Reply
from lm.async_decoding.judge import Judgement
from lm.async_decoding.quality import Question
from lm.data.messages import Conversation, Message
from lm.errors import DataError, UserError
from tests.lm.async_decoding.server import Server


def assembled(*segments):
    return Assembly(tuple(segments), {})


def longest_common(first, second):
    """By trying every subsequence."""
    for size in range(min(len(first), len(second)), 0, -1):
        parts = set(itertools.combinations(first, size))
        if any(part in parts for part in itertools.combinations(second, size)):
            return size
    return 0


def test_rouge_and_f1_are_their_definitions():
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = ([f"w{i}" for i in rng.integers(0, 4, rng.integers(1, 8))] for _ in range(2))
        common = longest_common(a, b)
        expected = 2 * common / (len(a) + len(b))
        assert quality.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)
        overlap = sum(min(a.count(w), b.count(w)) for w in set(a))
        expected = 2 * overlap / (len(a) + len(b))
        assert quality.token_f1(" ".join(a), " ".join(b)) == pytest.approx(expected)
    assert quality.rouge_l("The cat.", "the CAT") == 1
    assert quality.token_f1("", "") == 1
    assert quality.token_f1("a", "") == quality.rouge_l("", "a") == 0


def test_blocks_must_agree_on_facts():
    agreeing = assembled((0, "The tower is 300 m high. "), (1, "The tower is 300 m high; nice."))
    assert quality.consistency(agreeing) == 1
    other = assembled((1, "Ada is 36. Bob is 4."), (2, "Ada is 37. Bob is 4."), (0, "Cy is 1."))
    assert quality.consistency(other) == 0.5
    # a thread saw what it had said: only others can contradict it
    assert quality.consistency(assembled((1, "Ada is 36. Ada is 37."))) == 1
    # a count that starts from another one states it, too
    request = "Count.\nA: cap 3, nut +1\nB: pen 1, tea +1\nC: A, jam +2"
    right = "".join(part.line for part in requests.parts_of(request)).split("\n")
    blind = "C: A 5, jam +2 = 7. C is 7.\n"
    threads = [(1, right[0] + "\n"), (0, right[1] + "\n")]
    assert quality.consistency(assembled(*threads, (2, right[2] + "\n"))) == 1
    assert quality.consistency(assembled(*threads, (2, blind))) == 0
    exact = quality.scorer("requests")
    assert exact(Question(request), assembled(*threads, (2, blind))) == pytest.approx(2 / 3)


def test_scorers_refuse_what_they_cannot_score():
    with pytest.raises(UserError, match="choose token_f1 or rouge_l"):
        quality.scorer("requests")(Question("Hi"), assembled((0, "Hi")))
    with pytest.raises(UserError, match="rouge_l needs references"):
        quality.scorer("rouge_l")(Question("Hi"), assembled((0, "Hi")))
    with pytest.raises(UserError, match="'taste' is not one of requests"):
        quality.scorer("taste")


def test_questions_are_first_exchanges_without_tags():
    text = '<promise topic="t" tokens="10"/>b<async topic="t">a</async>'
    asked = Conversation((Message("user", "q"), Message("assistant", text), Message("user", "r")))
    lonely = Conversation((Message("user", "s"),))
    assert quality.questions([asked, lonely]) == [Question("q", "ab"), Question("s")]
    with pytest.raises(UserError, match="no conversation begins with a user"):
        quality.questions([Conversation((Message("system", "s"),))])


# --- judges


def test_a_judge_sees_both_orders(tmp_path):
    def top(body):
        text = body["messages"][0]["content"]
        first, second = text.index("good"), text.index("bad")
        return {"1": math.log(0.9), "2": math.log(0.1)} if first < second else {
            " 2": math.log(0.6), "1": math.log(0.2), "x": math.log(0.2)}  # fmt: skip

    with Server(reply=lambda body: "1", top=top) as server:
        made = Endpoint(EndpointConfig(server.url, "m"), tmp_path / "judge.jsonl")
        found = judge.by_endpoint(made)([("p", "good", "bad"), ("p", "bad", "good")])
        assert len(server.bodies) == 2  # a pair turned round is the other pair
        assert server.bodies[0]["logprobs"] is True
    np.testing.assert_allclose(found, [(0.1 + 0.25) / 2, (0.75 + 0.9) / 2])
    assert sum(found) == pytest.approx(1)
    scored = judge.scorer(lambda pairs: [0.7 for _ in pairs])
    assert scored(Question("p", "good"), assembled((0, "bad"))) == 0.7
    with pytest.raises(UserError, match="compares with references"):
        scored(Question("p"), assembled((0, "bad")))


def test_what_a_judge_writes_without_probabilities():
    assert [judge.second_of(Reply(text)) for text in ("2", "Answer 1.", "Both")] == [1.0, 0.0, 0.5]
    # a first token that is neither is passed over
    assert judge.second_of(Reply("2", top=({"x": 0.0}, {"1": math.log(0.25), "2": math.log(0.75)})))
    assert judge.second_of(Reply("", top=({"1": 0.0, "2": 0.0},))) == 0.5


def test_a_place_that_is_preferred_says_nothing():
    always_second = judge.both_orders(lambda pairs: [0.8] * len(pairs))
    assert always_second([("p", "a", "b")]) == [0.5]


# --- win rates


def simulated(n, theta, phi, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(100, 2000, n)
    base = rng.integers(100, 2000, n)
    apart = lengths - base
    chance = 1 / (1 + np.exp(-(theta + phi * np.tanh(apart / apart.std()))))
    wins = rng.random(n) < chance
    return [
        Judgement(float(w), int(b), int(x)) for w, b, x in zip(wins, base, lengths, strict=True)
    ]


def test_length_is_taken_out_of_win_rates():
    found = judge.length_controlled(simulated(20_000, theta=-0.4, phi=1.5))
    assert found.length_controlled == pytest.approx(100 / (1 + math.exp(0.4)), abs=1.0)
    assert found.slope == pytest.approx(1.5, abs=0.1)
    # a judge that only counts characters, and longer answers
    long = [Judgement(1.0, 100, 900 + i % 7) for i in range(200)]
    mixed = long + [Judgement(0.0, 900, 100 + i % 7) for i in range(100)]
    found = judge.length_controlled(mixed)
    assert found.plain == pytest.approx(200 / 3)
    assert abs(found.length_controlled - 50) < 10
    # nothing to control for, and what the model is fitted to is met
    even = [Judgement(share, 10, 10) for share in (0.2, 0.4, 0.9)]
    found = judge.length_controlled(even)
    assert found.length_controlled == pytest.approx(50.0, abs=1e-3)
    assert found.n == 3
    assert 99 < judge.length_controlled([Judgement(1.0, 5, 6)] * 4).length_controlled <= 100
    # difficulties explain what they explain
    hard = [0.0, 1.0] * 200
    uneven = [Judgement(1.0 - x, 10 + i % 3, 12, x) for i, x in enumerate(hard)]
    assert judge.length_controlled(uneven).length_controlled == pytest.approx(50, abs=2)
    # long answers to easy requests: without difficulties their length is what wins
    rng = np.random.default_rng(2)
    hard = rng.random(4000)
    chance = 1 / (1 + np.exp(4 * hard - 2))
    wins = (rng.random(4000) < chance).astype(float)
    lengths = (1000 - 800 * hard + rng.normal(0, 100, 4000)).astype(int)
    told = [Judgement(w, 600, int(n), x) for w, n, x in zip(wins, lengths, hard, strict=True)]
    silent = [dataclasses.replace(one, difficulty=None) for one in told]
    assert abs(judge.length_controlled(told).slope) < 0.5
    assert judge.length_controlled(silent).slope > 1


def test_judge_files_are_read(tmp_path):
    file = tmp_path / "annotations.json"
    records = [
        {"output_1": "abc", "output_2": "de", "preference": 1.25, "instruction": "x"},
        {"output_1": "", "output_2": "d", "preference": None},
        {"output_1": "a", "output_2": "b", "preference": 0},
    ]
    file.write_text(json.dumps(records))
    assert judge.read_judgements(file) == [Judgement(0.25, 3, 2), Judgement(0.5, 1, 1)]
    known = tmp_path / "difficulties.json"
    known.write_text(json.dumps({"x": 2, "y": -1}))
    records[2]["instruction"] = "y"
    file.write_text(json.dumps(records))
    found = judge.read_judgements(file, judge.read_difficulties(known))
    assert [one.difficulty for one in found] == [2.0, -1.0]
    with pytest.raises(DataError, match="instruction 'y' has no difficulty"):
        judge.read_judgements(file, {"x": 2.0})
    known.write_text("[1, 2]")
    with pytest.raises(UserError, match="not an object from requests to numbers"):
        judge.read_difficulties(known)
    file.write_text(json.dumps([{"output_1": "a", "output_2": "b", "preference": 3}]))
    with pytest.raises(DataError, match=r"annotations\.json:1: preference 3 is not"):
        judge.read_judgements(file)


# --- the front


def test_the_front_and_its_area_are_brute_force():
    rng = np.random.default_rng(1)
    for _ in range(100):
        points = [
            (float(q), float(s))
            for q, s in zip(rng.integers(0, 6, 5) / 5, rng.integers(5, 15, 5) / 5, strict=True)
        ]
        kept = {points[i] for i in front.front(points)}
        better = {
            p for p in points
            if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)
        }  # fmt: skip
        assert kept == better
        assert len(front.front(points)) == len(kept)
        cells = [
            (q + 0.1, s + 0.1)
            for q in np.arange(0, 1, 0.2) for s in np.arange(1, 3, 0.2)
        ]  # fmt: skip
        covered = sum(any(p[0] > q and p[1] > s for p in points) for q, s in cells)
        assert front.hypervolume(points) == pytest.approx(0.04 * covered, abs=1e-9)
    assert front.dominates([(0.9, 2.0), (1.0, 1.5)], [(0.9, 1.9), (1.0, 1.5)])
    assert not front.dominates([(0.9, 2.0)], [(0.95, 1.0)])
    assert front.hypervolume([]) == 0
