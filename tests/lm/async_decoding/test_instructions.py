# SPDX-License-Identifier: Apache-2.0
"""Prompts and instructions in the forms that people have them in."""

import json

import pytest

from lm.async_decoding import instructions, quality
from lm.async_decoding.quality import Question
from lm.errors import DataError


def test_every_form_gives_questions(tmp_path):
    file = tmp_path / "alpaca_eval.json"
    records = [
        {"instruction": "Name a tree.", "dataset": "helpful_base", "generator": "x"},
        {"instruction": "Sum up.", "input": "A text.", "output": "A."},
    ]
    file.write_text(json.dumps(records, indent=1))
    found = quality.questions(list(instructions.read(file)))
    assert found == [Question("Name a tree."), Question("Sum up.\n\nA text.", "A.")]
    file = tmp_path / "mixed.jsonl"
    mixed = [
        {"prompt": "p", "reference": "r"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
    ]
    mixed.append({"prompt": "u", **mixed[1]})  # which says less than its messages
    file.write_text("".join(json.dumps(record) + "\n" for record in mixed))
    made = list(instructions.read(file))
    wanted = [Question("p", "r"), Question("u", "a"), Question("h", "g"), Question("u", "a")]
    assert quality.questions(made) == wanted
    assert [conversation.line for conversation in made] == [1, 2, 3, 4]
    assert quality.questions(list(instructions.read(file, limit=1))) == [Question("p", "r")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": 3}, "instruction must be a text, not int"),
        ({"instruction": " "}, "instruction is empty"),
        ({"instruction": "x", "output": []}, "output must be a text, not list"),
        ({"question": "x"}, ""),
    ],
)
def test_bad_records_are_located(tmp_path, record, reason):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"instruction": "x"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=f"bad.jsonl:2: {reason}"):
        list(instructions.read(file))
    assert len(list(instructions.read(file, on_error="skip"))) == 1
