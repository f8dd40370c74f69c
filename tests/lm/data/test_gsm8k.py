# SPDX-License-Identifier: Apache-2.0
"""GSM8K files: parsing, grouping into conversations, and reading answers back."""

import json

import pytest

from lm.data import gsm8k
from lm.data.messages import Message
from lm.errors import DataError, UserError

RECORDS = [
    {
        "question": "A box holds 4 pens. How many pens do 3 boxes hold?",
        "answer": "3 boxes hold 3 * 4 = <<3*4=12>>12 pens.\n#### 12",
    },
    {
        "question": "Kim has $2,000 and spends half. What is left?",
        "answer": "She spends 2,000 / 2 = $<<2000/2=1000>>1,000.\nLeft: $1,000.\n#### $1,000",
    },
    {
        "question": "It is 3 degrees and falls by 5.5. ",
        "answer": "3-5.5=<<3-5.5=-2.5>>-2.5\n#### -2.5",
    },
    {"question": "What is 1?", "answer": "#### 1"},
    {"question": "What is 2?", "answer": "2 #### is 2\n#### 2"},
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return file


def test_problems(path):
    problems = list(gsm8k.read_problems(path))
    assert [p.line for p in problems] == [1, 2, 3, 4, 5]
    assert [p.answer for p in problems] == ["12", "1000", "-2.5", "1", "2"]
    assert problems[0].solution == "3 boxes hold 3 * 4 = 12 pens."
    assert problems[1].solution == "She spends 2,000 / 2 = $1,000.\nLeft: $1,000."
    assert problems[2].question == "It is 3 degrees and falls by 5.5."
    assert problems[3].solution == ""
    assert problems[4].solution == "2 #### is 2"


@pytest.mark.parametrize(("per_conversation", "turns"), [(1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
def test_every_problem_is_used_once(path, per_conversation, turns):
    problems = list(gsm8k.read_problems(path))
    made = list(gsm8k.conversations_of(problems, per_conversation=per_conversation, file="f"))
    assert [c.num_turns for c in made] == turns
    asked = [m.content for c in made for m in c.messages if m.role == "user"]
    assert sorted(asked) == sorted(p.question for p in problems)
    lines = {p.question: p.line for p in problems}
    assert all(c.line == lines[c.messages[0].content] and c.file == "f" for c in made)


def test_a_turn(path):
    (problem, *_) = gsm8k.read_problems(path)
    (conversation,) = gsm8k.conversations_of([problem])
    assert conversation.messages == (
        Message("user", RECORDS[0]["question"]),
        Message("assistant", "The answer is 12.", thought="3 boxes hold 3 * 4 = 12 pens."),
    )
    assert gsm8k.expected(conversation) == ["12"]


def test_order_is_drawn_from_the_seed(path):
    problems = list(gsm8k.read_problems(path)) * 10
    first, again, other = (
        [c.messages for c in gsm8k.conversations_of(problems, seed=seed)] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_bad_group_size():
    with pytest.raises(UserError, match="problems_per_conversation must be at least 1"):
        list(gsm8k.conversations_of([], per_conversation=0))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "not a JSON object"),
        ({"answer": "#### 1"}, "no text under 'question'"),
        ({"question": "q", "answer": 1}, "no text under 'answer'"),
        ({"question": " ", "answer": "#### 1"}, "no text under 'question'"),
        ({"question": "q", "answer": "it is 1"}, "no line '#### NUMBER'"),
        ({"question": "q", "answer": "#### one"}, "final answer 'one' is not a number"),
    ],
)
def test_malformed(tmp_path, record, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in [RECORDS[0], record, RECORDS[3]]))
    with pytest.raises(DataError, match=reason) as error:
        list(gsm8k.read_problems(path))
    assert str(error.value).startswith(f"{path}:2: ")
    reader = gsm8k.read_problems(path, on_error="skip")
    assert [p.line for p in reader] == [1, 3]
    assert reader.skipped == 1


@pytest.mark.parametrize(
    ("content", "stated"),
    [
        ("The answer is 12.", "12"),
        ("The answer is $1,234,567.", "1234567"),
        ("The answer is $1,200.00.", "1200"),
        ("The answer is 5.50", "5.5"),
        ("So the answer is: -2.5", "-2.5"),
        ("The answer is 3. No, the answer is 4.", "4"),
        ("12", None),
        ("The answer is unknown.", None),
        ("The answer is 1.2.3", None),
    ],
)
def test_answer(content, stated):
    assert gsm8k.answer(content) == stated
