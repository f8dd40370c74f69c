# SPDX-License-Identifier: Apache-2.0
import dataclasses
import re

import pytest

from lm.async_decoding import critical_path, language, programs, requests
from lm.async_decoding.language import Promise, Sync, Text
from lm.async_decoding.requests import RequestConfig, RequestData
from lm.data import sources
from lm.errors import UserError
from lm.text import tokenizers

TOKENIZER = tokenizers.load_tokenizer("bytes").add_tokens(language.TAGS)


def examples(kind, count=60, **settings):
    config = RequestConfig(kinds=(kind,), **settings)
    for index in range(count):
        prompt, answer = requests.generate(3, index, config).messages
        program = language.validate(language.parse(answer.content))
        yield prompt.content, program


def evaluated(prompt):
    """The counts of a request by Python's own arithmetic."""
    values = {}
    for label, first, rest in re.findall(r"(\w+): ([\w ]+)((?:, \w+ [-+]\d+)*)", prompt):
        start = values[first] if first in values else int(first.split()[1])
        values[label] = start + sum(map(int, re.findall(r"[-+]\d+", rest)))
    return values


@pytest.mark.parametrize("kind", requests.KINDS)
def test_the_annotated_answer_is_right(kind):
    for prompt, program in examples(kind):
        answer = language.render(program)
        assert requests.quality(prompt, answer) == 1.0
        parts = requests.parts_of(prompt)
        assert len({part.label for part in parts}) == len(parts)
        if kind != "facts":
            counts = evaluated(prompt)
            assert all(0 <= value <= 20 for value in counts.values())
            stated = dict(re.findall(r"(\w) is (\d+)\.\n", answer))
            assert stated == {label: str(value) for label, value in counts.items()}
            for left, sign, right, result in re.findall(r"(\d+), \w+ ([-+])(\d+) = (\d+)", answer):
                assert int(left) + int(sign + right) == int(result)
        if kind == "plan":
            assert answer.endswith(f"Most: {max(counts, key=counts.get)}.\n")


@pytest.mark.parametrize("kind", requests.KINDS)
def test_programs_know_what_depends_on_what(kind):
    """Whatever a block starts from was said before its promise, or synced before it."""
    for prompt, program in examples(kind):
        known, waiting, threads = "", "", iter(program.threads)
        for item in program.items:
            if isinstance(item, Text):
                for part in requests.parts_of(prompt):
                    if part.line in item.text:
                        before = known + item.text[: item.text.index(part.line)]
                        assert not part.after or f"{part.after} is " in before
                        assert not part.last or not waiting
                known += item.text
            elif isinstance(item, Promise):
                line = next(threads)
                (part,) = (p for p in requests.parts_of(prompt) if p.line == line)
                assert not part.after or f"{part.after} is " in known
                waiting += line
            else:
                assert isinstance(item, Sync)
                known, waiting = known + waiting, ""
        assert bool(program.threads) == (kind != "chain") or kind == "linked"


@pytest.mark.parametrize("kind", requests.KINDS)
def test_annotators_promise_more_or_less(kind):
    """What a reader gets is the same; only `all` promises what it cannot know."""
    counts = {}
    for annotator in requests.ANNOTATORS:
        found = list(examples(kind, 30, annotators=(annotator,)))
        for (prompt, program), (other, best) in zip(found, examples(kind, 30), strict=True):
            assert prompt == other
            assert language.render(program) == language.render(best)
            if annotator == "all":
                assert len(program.threads) == len(requests.parts_of(prompt)) - 1
                assert Sync() not in program.items
        counts[annotator] = sum(len(program.threads) for _, program in found)
    assert counts["none"] == 0 <= counts["half"] <= counts["best"] <= counts["all"]
    assert (0 < counts["half"] < counts["best"]) == (kind != "chain")
    assert (counts["best"] == counts["all"]) == (kind in ("sums", "facts"))


def test_annotators_are_drawn():
    names = ("half", "half", "best", "all")
    mixed = [program for _, program in examples("plan", 200, annotators=names)]
    alone = {name: [p for _, p in examples("plan", 200, annotators=(name,))] for name in names}
    shares = {name: sum(a == b for a, b in zip(mixed, alone[name], strict=True)) for name in names}
    assert sum(shares.values()) == 200
    assert 70 < shares["half"] < 130
    assert min(shares.values()) > 30


def test_parts_are_scored_apart():
    prompt, program = next(examples("plan"))
    lines = language.render(program).split("\n")
    count = len(lines) - 1
    assert sum(requests.score(prompt, "\n".join(lines[1:]))) == count - 1
    wrong = [re.sub(r"is \d+\.$", "is 99.", lines[0]), *lines[1:]]
    assert requests.score(prompt, "\n".join(wrong)) == [False, *[True] * (count - 1)]
    assert requests.score(prompt, "\n".join([*lines[:-2], "Most: Z."]))[-1] is False
    assert requests.quality(prompt, "") == 0.0
    assert requests.score(prompt, "\n".join([wrong[0], *lines]))[0] is False  # the first one counts
    prompt, program = next(examples("facts"))
    answer = language.render(program)
    assert requests.quality(prompt, answer.replace("lives in", "works in", 1)) < 1.0


def test_the_same_index_is_the_same_request_in_any_order():
    made = [requests.generate(0, index) for index in range(40)]
    assert [requests.generate(0, index) for index in reversed(range(40))] == made[::-1]
    held_out = {requests.generate(0, index, split="validation").messages[0] for index in range(40)}
    assert not held_out & {one.messages[0] for one in made}
    assert len(held_out) == 40
    assert {one.messages[0].content.split("\n")[0] for one in made} == {
        "Count.",
        "Count, then name the most.",
        "Describe.",
    }


def test_promises_pay():
    """Requests whose parts are independent take far fewer steps, a chain takes as many."""
    tokenizer = TOKENIZER
    gains = {}
    for kind in requests.KINDS:
        gains[kind] = []
        for _, program in examples(kind, 20):
            made = language.recounted(program, tokenizer)
            encoded = programs.encode(made, [1], tokenizer, 0)
            alone = len(tokenizer.encode(language.render(program))) + 1
            gains[kind].append(critical_path.speedup(alone, critical_path.critical_path(encoded)))
    means = {kind: critical_path.geometric_mean(found) for kind, found in gains.items()}
    assert means["chain"] == 1.0
    assert min(means["sums"], means["facts"], means["plan"]) > 3.0
    assert 1.5 < means["linked"] < means["sums"]


def test_requests_are_a_prepared_data_set(tmp_path):
    data = RequestData(30, seed=5)
    source = sources.open_source(data, tmp_path)
    assert len(source) == 30
    assert source[7] == requests.generate(5, 7)
    held_out = sources.open_source(dataclasses.replace(data, held_out=True), tmp_path)
    assert held_out[2] == requests.generate(5, 2, split="validation")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kinds": ("sums", "poems")}, "requests.kinds: poems; known"),
        ({"kinds": ()}, "requests.kinds: none"),
        ({"annotators": ("best", "worst")}, "requests.annotators: worst; known"),
        ({"min_parts": 2}, "3 <= min_parts"),
        ({"max_steps": 20}, r"max_parts \* \(max_steps \+ 1\) <= 72"),
        ({"fields": 9}, "fields <= 8"),
        ({"max_operand": 30}, "max_operand"),
    ],
)
def test_impossible_settings_are_refused(settings, reason):
    with pytest.raises(UserError, match=reason):
        RequestConfig(**settings)
    with pytest.raises(UserError, match="split must be one of"):
        requests.generate(0, 0, split="test")
    with pytest.raises(ValueError, match="not a request made here"):
        requests.score("Hello", "x")
