# SPDX-License-Identifier: Apache-2.0
"""The client against a server on this machine: what fails, what it costs, what is kept, the key."""

import json
import math
import random

import pytest

from lm.async_decoding import language, prompted
from lm.async_decoding.annotate import Report, annotate
from lm.async_decoding.endpoint import Endpoint, EndpointConfig, Reply, Request
from lm.async_decoding.language import LanguageError
from lm.data.messages import Conversation, Message
from lm.errors import UserError
from tests.lm.async_decoding.server import Server

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("THE_KEY", KEY)


def client(server, tmp_path, **values):
    waits = []
    settings = {"url": server.url, "model": "m", "key_env": "THE_KEY", "workers": 1} | values
    made = Endpoint(
        EndpointConfig(**settings),
        tmp_path / "replies.jsonl",
        sleep=waits.append,
        rng=random.Random(0),
    )
    return made, waits


def asking(text, **values):
    return Request((("user", text),), max_tokens=10, **values)


def test_what_fails_for_now_is_tried_again(tmp_path, capfd):
    script = [500, "garbage", "drop", (429, {"Retry-After": "7"}), 503]
    with Server(script=script) as server:
        made, waits = client(server, tmp_path, longest_wait=30.0)
        (reply,) = made.fetch([asking("a")])
    assert reply.text == "yes"
    assert (reply.tokens_in, reply.tokens_out) == (5, 1)
    assert len(server.bodies) == 6
    assert server.bodies[0] == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 10,
        "temperature": 0.0,
    }
    assert waits[3] == 7  # what the endpoint asked for
    for wait, most in zip(waits[:3] + waits[4:], (1, 2, 4, 16), strict=True):
        assert most / 2 <= wait <= most
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    assert KEY not in capfd.readouterr().err + (tmp_path / "replies.jsonl").read_text()


def test_replies_may_hold_other_ends_of_lines(tmp_path):
    text = "a\u2028b\u0085c"
    with Server(script=[(429, {"Retry-After": "nan"})], reply=lambda body: text) as server:
        for _ in range(2):
            made, _ = client(server, tmp_path)
            assert made.fetch([asking("x")])[0].text == text
        assert len(server.bodies) == 2  # one was refused, none asked again


def test_a_server_that_hangs_or_never_recovers_is_given_up(tmp_path, capfd):
    with Server(script=["hang", "hang"]) as server:
        made, waits = client(server, tmp_path, timeout=0.2, attempts=2)
        assert made.fetch([asking("a")]) == [None]
        assert len(waits) == 1
        assert "1 requests got no reply; the last: no reply within 0.2 s (2 attempts)" in (
            capfd.readouterr().err
        )
        server.script = [500] * 2
        assert made.fetch([asking("a"), asking("b")])[1].text == "yes"
        err = capfd.readouterr().err
        assert 'status 500: {"error": "no, and your key Bearer *** is known"}' in err
        assert KEY not in err
        assert made.fetch([asking("a")])[0].text == "yes"  # a rerun tries again
    gone, _ = client(server, tmp_path, attempts=1)
    assert gone.fetch([asking("c")]) == [None]
    assert "cannot be reached" in capfd.readouterr().err


def test_a_request_that_is_refused_by_itself_stops_no_other(tmp_path, capfd):
    with Server(script=[413, 400, 422]) as server:
        made, waits = client(server, tmp_path)
        found = made.fetch([asking(letter) for letter in "abcde"])
        assert [reply and reply.text for reply in found] == [None] * 3 + ["yes"] * 2
        assert "3 requests got no reply; the last: status 422" in capfd.readouterr().err
        server.script = [400]
        assert made.fetch([asking("a")]) == [None]  # others were answered
        assert not waits
    with Server(script=[400] * 9) as server:
        (tmp_path / "b").mkdir()
        made, _ = client(server, tmp_path / "b")
        with pytest.raises(UserError, match="the endpoint refuses the request: status 400"):
            made.fetch([asking(str(number)) for number in range(20)])
        assert len(server.bodies) < 20


def test_a_reply_that_trickles_is_given_up(tmp_path, capfd):
    with Server(script=["trickle"]) as server:
        made, _ = client(server, tmp_path, timeout=0.2, attempts=1)
        assert made.fetch([asking("a")]) == [None]
    assert "no reply within 0.2 s" in capfd.readouterr().err


@pytest.mark.parametrize("status", [400, 401, 404, (302, {"Location": "http://127.0.0.1:9/x"})])
def test_what_will_not_change_is_refused_at_once(tmp_path, status):
    with Server(script=[status]) as server:
        made, waits = client(server, tmp_path)
        with pytest.raises(UserError, match="the endpoint refuses the request: status") as caught:
            made.fetch([asking("a")])
    assert not waits
    assert len(server.bodies) == 1
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_replies_are_kept(tmp_path):
    requests = [asking(text) for text in "abcab"]
    with Server(reply=lambda body: body["messages"][0]["content"] * 2) as server:
        made, _ = client(server, tmp_path, workers=3)
        assert [reply.text for reply in made.fetch(requests)] == ["aa", "bb", "cc", "aa", "bb"]
        assert len(server.bodies) == 3
        file = tmp_path / "replies.jsonl"
        lines = file.read_text().splitlines()
        file.write_text("\n".join([*lines[:2], lines[2][:30]]))  # cut short by a kill
        again, _ = client(server, tmp_path)
        assert len([r for r in again.fetch(requests) if r]) == 5
        assert len(server.bodies) == 4
        other, _ = client(server, tmp_path, model="another")
        other.fetch(requests[:1])
        assert len(server.bodies) == 5  # of another model is another request
    third, _ = client(server, tmp_path)
    assert third.estimate(requests).requests == 0
    assert third.fetch(requests)[0].text == "aa"  # no server needed


def test_the_cost_is_said_before_anything_is_sent(tmp_path, capfd):
    with Server() as server:
        made, _ = client(server, tmp_path, price_in=1e6, price_out=2e6, max_cost=80.0)
        estimate = made.estimate([asking("x" * 40)])
        assert (estimate.tokens_in, estimate.tokens_out) == (18, 10)
        assert estimate.cost == 38
        with pytest.raises(UserError, match=r"may cost 114\.00, above --max_cost=80"):
            made.fetch([asking(letter * 40) for letter in "xyz"])
        assert not server.bodies
        assert "3 of 3 requests to m: about 54 tokens in, at most 30 out, at most 114.00" in (
            capfd.readouterr().err
        )
        made.fetch([asking("x" * 40)])
        made.fetch([asking("x" * 40), asking("y" * 40)])  # one of them is paid for
        assert len(server.bodies) == 2
        with pytest.raises(UserError, match=r"may cost 38\.00 after 76\.00 before, above"):
            made.fetch([asking("z" * 40)])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"url": "ftp://x"}, "must begin with http"),
        ({"url": "http://me:secret@x/v1"}, "must not hold a user, a password"),
        ({"key_env": "NO_SUCH_KEY"}, "variable NO_SUCH_KEY is not set"),
        ({"max_cost": 1.0}, "--max_cost needs prices"),
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"attempts": 0}, "attempts=0 must be at least 1"),
        ({"price_in": -1.0}, "that are not negative"),
        ({"price_out": math.nan, "max_cost": 1.0}, "that are not negative"),
        ({"timeout": math.inf}, "and finite"),
    ],
)
def test_settings_that_cannot_work_are_refused(values, reason):
    with pytest.raises(UserError, match=reason) as caught:
        EndpointConfig(**({"url": "http://x/v1", "model": "m"} | values))
    assert "secret" not in str(caught.value)


def test_a_key_that_no_header_can_hold_is_not_quoted(monkeypatch):
    monkeypatch.setenv("THE_KEY", f"{KEY}\n")
    with pytest.raises(UserError, match="THE_KEY holds no usable key") as caught:
        EndpointConfig("http://x", "m", key_env="THE_KEY")
    assert KEY not in str(caught.value)


# --- the annotator

ANSWER = "- Elms shade avenues with their leaves.\n- Oaks feed jays and squirrels alike.\n"
MARKED = (
    '<promise topic="elms" tokens="10"/>- Oaks feed jays and squirrels alike.\n'
    '<async topic="elms">- Elms shade avenues with their leaves.\n</async>'
)


def conversation(*contents):
    roles = ("user", "assistant") * 2
    return Conversation(tuple(Message(r, c) for r, c in zip(roles, contents, strict=False)))


def test_answers_are_annotated_at_an_endpoint_and_checked(tmp_path):
    replies = {ANSWER: MARKED, "Hi.": "Hi!", "Two. Three.": "<sync/>Two. Three."}

    def reply(body):
        return replies[body["messages"][-1]["content"].rpartition("[answer to mark up]\n")[2]]

    asked = [conversation("Trees?", text) for text in replies]
    with Server(reply=reply) as server:
        made, _ = client(server, tmp_path)
        annotator = prompted.Prompted(made)
        annotator.fetch(asked)
        assert len(server.bodies) == 3
        messages = server.bodies[0]["messages"]
        assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 7, "user"]
        assert all(tag in messages[0]["content"] for tag in language.TAGS)
        report = Report()
        found = [annotate(one, annotator, report) for one in asked]
        assert len(server.bodies) == 3  # nothing is asked for twice
        server.script = [400]
        other = conversation("Trees?", "Four.")
        annotator.fetch([other])
        assert annotate(other, annotator, Report()) == other
        assert len(server.bodies) == 4  # what was refused is left to a rerun
    program = language.parse(found[0].messages[1].content)
    assert language.render(program) == ANSWER
    assert len(program.threads) == 1
    assert report.annotated == 1
    assert report.refused == {
        "the program does not read as the answer": 1,
        "<sync/> waits for nothing": 1,
    }
    assert found[1].messages[1].content == "Hi."


def test_examples_are_programs_of_their_answers():
    found = prompted.examples()
    assert len(found) == 7
    for _, answer, marked in found:
        program = language.validate(language.parse(marked))
        assert language.render(program) == answer
        assert language.to_text(program) == marked
    assert {bool(language.parse(marked).threads) for *_, marked in found} == {True, False}


def test_replies_are_read_with_or_without_a_fence():
    assert prompted.program_of(Reply(f"```xml\n{MARKED}```"), ANSWER) == language.parse(MARKED)
    for text in ("Yes.", "Yes.\n\n"):
        assert language.render(prompted.program_of(Reply(text), "Yes.\n")) == "Yes.\n"
    with pytest.raises(LanguageError, match="the reply was cut off"):
        prompted.program_of(Reply(MARKED, finish="length"), ANSWER)
    lines = "One line.\nAnother line.\n"
    last = '<promise topic="a" tokens="10"/>Another line.\n<async topic="a">One line.\n</async>'
    for text in (last, last + "\n", f"```\n{last}\n```"):
        assert language.render(prompted.program_of(Reply(text), lines)) == lines
    assert json.dumps(prompted.request([Message("user", "q")], "a").body("m"))
