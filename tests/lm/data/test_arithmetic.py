# SPDX-License-Identifier: Apache-2.0
"""Generated conversations: right by an independent reading of their questions, and reproducible."""

import re

import numpy as np
import pytest

from lm.data import arithmetic
from lm.data.arithmetic import ArithmeticConfig
from lm.data.messages import Conversation, Message
from lm.data.records import parse_record
from lm.errors import UserError

ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
WORDS = {"add": 1, "plus": 1, "subtract": -1, "minus": -1}
CONFIGS = {
    "default": ArithmeticConfig(),
    "varied": ArithmeticConfig(max_number=99, two_steps=0.3, recall=0.3, phrasings=2),
    "tools": ArithmeticConfig(max_number=99, tools=True, tool_rate=0.5),
    "hard": ArithmeticConfig(
        max_turns=12, max_number=999, max_operand=50, two_steps=0.8, recall=0.8, phrasings=3
    ),
    "small": ArithmeticConfig(max_number=9, max_operand=9, recall=1.0, two_steps=1.0, tools=True),
}


def solve(question, answers):
    """Reads a question without the generator's help."""
    words = re.findall(r"\d+|[a-z]+", question.lower())
    named = [answers[ORDINALS.index(w)] for w in words if w in ORDINALS]
    numbers = [int(w) for w in words if w.isdigit()]
    signs = [WORDS[w] for w in words if w in WORDS]
    if "multiply" in words or "times" in words:
        return answers[-1] * numbers[0]
    if named and numbers:  # Add 3 to the first answer.
        return named[0] + signs[0] * numbers[0]
    if named:  # Add the first answer to that.
        return answers[-1] + signs[0] * named[0]
    value = answers[-1] if answers else numbers.pop(0)
    return value + sum(sign * number for sign, number in zip(signs, numbers, strict=True))


def questions(conversation):
    return [m.content for m in conversation.messages if m.role == "user"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("split", arithmetic.SPLITS)
def test_every_answer_is_right(config, split):
    turns = set()
    for index in range(150):
        conversation = arithmetic.generate(3, index, config, split)
        answers = []
        for question in questions(conversation):
            answers.append(solve(question, answers))
        assert arithmetic.expected(conversation) == [str(a) for a in answers]
        assert all(0 <= a <= config.max_number for a in answers)
        turns.add(len(answers))
    assert turns == set(range(config.min_turns, config.max_turns + 1))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_thoughts_do_the_steps(config):
    steps = 0
    for index in range(50):
        messages = arithmetic.generate(0, index, config).messages
        for message in messages:
            if message.role != "assistant" or message.tool_calls or message.thought is None:
                continue
            for step in message.thought.split(", "):
                left, sign, right, result = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", step).groups()
                assert int(left) + int(sign + right) == int(result)
                steps += 1
            assert message.content == f"It is {result}."
    assert steps > 50


def test_tools_go_through_the_calculator():
    calls = 0
    for index in range(50):
        conversation = arithmetic.generate(0, index, CONFIGS["tools"])
        assert conversation.tools == (arithmetic.CALCULATOR,)
        for call, result, response in zip(
            conversation.messages,
            conversation.messages[1:],
            conversation.messages[2:],
            strict=False,
        ):
            if not call.tool_calls:
                continue
            function = call.tool_calls[0]["function"]
            assert function["name"] == "calculator"
            assert arithmetic.calculator(function["arguments"]) == result.content
            assert result.tool_call_id == call.tool_calls[0]["id"]
            assert response == Message("assistant", f"It is {result.content}.")
            assert call.thought == function["arguments"]["expression"]
            calls += 1
    assert calls > 10
    assert arithmetic.generate(0, 0).tools is None


def test_later_turns_name_earlier_answers():
    def named(recall):
        config = ArithmeticConfig(max_turns=6, recall=recall)
        asked = [q for i in range(100) for q in questions(arithmetic.generate(0, i, config))]
        return sum("answer" in q for q in asked) / len(asked)

    assert named(0.0) == 0 < named(0.1) < named(0.9)


def test_random_access_is_deterministic_and_independent_of_global_state():
    first = [arithmetic.generate(5, i) for i in range(20)]
    np.random.seed(1)  # noqa: NPY002
    again = [arithmetic.generate(5, i) for i in reversed(range(20))]
    assert first == again[::-1]
    assert arithmetic.generate(5, np.int64(3)) == first[3]
    assert arithmetic.generate(6, 0) != first[0]
    assert len({c.messages for c in first if not c.tools}) == 20


def test_splits_share_no_conversation():
    config = ArithmeticConfig(max_turns=2, max_number=9, phrasings=1, two_steps=0.0)
    asked = {
        split: {
            tuple(questions(arithmetic.generate(seed, i, config, split)))
            for seed in (0, 1)
            for i in range(400)
        }
        for split in arithmetic.SPLITS
    }
    assert len(asked["validation"]) > 50
    assert asked["train"].isdisjoint(asked["validation"])


def test_conversations_are_well_formed_records():
    for index in range(30):
        made = arithmetic.generate(0, index, CONFIGS["tools"])
        record = {"messages": [m.to_dict(True) for m in made.messages], "tools": list(made.tools)}
        assert parse_record(record, file=made.file, line=made.line) == made
        assert Conversation.from_json(made.to_json()) == made


def test_turns_are_short():
    lengths = [
        len(text.encode())
        for i in range(200)
        for m in arithmetic.generate(0, i).messages
        for text in (m.content, m.thought or "")
    ]
    assert max(lengths) <= 45


@pytest.mark.parametrize(
    ("content", "stated"),
    [
        ("It is 12.", "12"),
        ("It is -3.", "-3"),
        ("It is 1. No: It is 2.", "2"),
        ("It is 12", None),
        ("12", None),
        ("", None),
    ],
)
def test_answer(content, stated):
    assert arithmetic.answer(content) == stated


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ({"expression": "6*7"}, "42"),
        ('{"expression": " 6 - 7 "}', "-1"),
        ({"expression": "6+7"}, "13"),
        ({"expression": "6**7"}, "error"),
        ({"expression": "__import__('os')"}, "error"),
        ({"expression": 3}, "error"),
        ({}, "error"),
        ("6*7", "error"),
        ("[1]", "error"),
    ],
)
def test_calculator(arguments, result):
    assert arithmetic.calculator(arguments) == result


def test_expected_refuses_other_conversations():
    with pytest.raises(ValueError, match="states nothing"):
        arithmetic.expected(Conversation((Message("user", "x"), Message("assistant", "y"))))


@pytest.mark.parametrize(
    "settings",
    [
        {"min_turns": 0},
        {"min_turns": 5, "max_turns": 4},
        {"max_number": 3},
        {"max_operand": 0},
        {"max_operand": 21},
        {"two_steps": 1.5},
        {"recall": -0.1},
        {"tool_rate": 2.0},
        {"phrasings": 4},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(UserError, match="arithmetic: "):
        ArithmeticConfig(**settings)


def test_bad_split():
    with pytest.raises(UserError, match="split must be one of train, validation"):
        arithmetic.generate(0, 0, split="test")
