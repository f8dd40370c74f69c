# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.async_decoding import annotate, language
from lm.async_decoding.language import LanguageError, Program, Text
from lm.data import conversations
from lm.data.messages import Conversation, Message
from lm.text import tokenizers

RULES = annotate.Rules(tokenizers.load_tokenizer("bytes"))
HISTORY = (Message("user", "Tell me."),)
APPLES = "Apples are crisp and keep well through the whole winter."
BANANAS = "Bananas grow near the equator, in big bunches that hang."
CHERRIES = "Cherries ripen in early summer, long before anything else."


def programmed(answer):
    return annotate.checked(RULES, HISTORY, answer)


def shape(program):
    """p for a promise, t for text, s for a sync."""
    return "".join(type(item).__name__[0].lower() for item in program.items)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"Fruits:\n\n1. {APPLES}\n2. {BANANAS}\n3. {CHERRIES}\n", "tppt"),
        (f"Fruits:\n- {APPLES}\n- {BANANAS}\n\nOverall, all are healthy.\n", "tptst"),
        (f"# One\n{APPLES}\n\n# Two\n{BANANAS}\n\n# Three\n{CHERRIES}\n", "tptpt"),
        (f"{APPLES} {BANANAS} {CHERRIES}", "ppt"),
        (f"{APPLES} {BANANAS} It is yellow. {CHERRIES}", "ptst"),  # "It" points back
        (f"1. {APPLES}\n2. Peel the apples. {BANANAS}\n", "t"),  # leans on item 1
        (f"1. {APPLES}\n2. Repeat step 1 with everything that is left over there.\n", "t"),
        (f"1. {APPLES}\n   - Sweet ones.\n   - Sour ones.\n2. {BANANAS}\n", "pt"),
        ("- red\n- green\n- blue\n", "t"),  # too short to be worth a promise
        (APPLES, "t"),
        ("", ""),
    ],
)
def test_rules(answer, expected):
    program = programmed(answer)
    assert shape(program) == expected
    assert language.render(program) == answer
    assert all(len(p.topic.split()) <= 3 for p in program.promises)


def test_words_of_the_prompt_bind_nothing():
    answer = f"1. {APPLES}\n2. Pears differ from apples in nearly every respect but price.\n"
    assert shape(programmed(answer)) == "t"
    asked = (Message("user", "Compare apples with pears."),)
    assert shape(annotate.checked(RULES, asked, answer)) == "pt"


lines = st.sampled_from(
    [APPLES, BANANAS, CHERRIES, "", "  - Kiwis are green.", "- x", "1. One", "# Head", "Pi is 3.14",
     "So: what?!", "(Yes.) \u2028 no", "...", "\t", "a) Lemon trees need plenty of sun and water."]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(lines, max_size=10), st.sampled_from(["\n", "\n\n", " ", "\r\n"]))
def test_no_answer_changes(parts, separator):
    answer = separator.join(parts)
    assert "".join(unit.text for unit in annotate.units_of(answer)) == answer
    program = programmed(answer)
    assert language.parse(language.to_text(program)) == program


def conversation(*contents):
    roles = ("user", "assistant") * 9
    return Conversation(tuple(Message(r, c) for r, c in zip(roles, contents, strict=False)))


def test_files(tmp_path):
    out = tmp_path / "out.jsonl"
    listed = f"- {APPLES}\n- {BANANAS}\n"
    given_ones = [
        conversation("Hi", listed, "And?", "No."),
        conversation("Hi", 'Write <async topic="x">.'),
    ]
    report = annotate.write(given_ones, RULES, out)
    assert (report.conversations, report.answers, report.annotated) == (2, 3, 1)
    assert (report.sequential, report.dropped, report.promises) == (1, 1, 1)
    assert list(report.refused) == ["a text holds the tag '<async topic=\"'"]
    (made,) = conversations.read_conversations(out)
    assert language.render(language.parse(made.messages[1].content)) == listed
    assert made.messages[3].content == "No."
    (line,) = out.read_text().splitlines()
    assert json.loads(line).keys() == {"messages"}
    branch = conversations.Branch(1, (Message("assistant", listed),))
    one = dataclasses.replace(given_ones[0], branches=(branch,), file="x", line=9)
    annotate.write([one], RULES, out)
    (made,) = conversations.read_conversations(out)
    assert made.branches == (branch,)  # as they were
    assert (made.file, made.line) == (str(out), 1)


def test_an_annotator_that_changes_words_is_refused():
    def careless(history, answer):
        return Program((Text(answer.upper()),))

    with pytest.raises(LanguageError, match="at 1: the program does not read as the answer"):
        annotate.checked(careless, HISTORY, "Oslo")
    report = annotate.Report()
    made = annotate.annotate(conversation("Hi", "Oslo"), careless, report)
    assert made.messages[1].content == "Oslo"
    assert report.refused == {"the program does not read as the answer": 1}
