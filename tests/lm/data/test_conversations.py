# SPDX-License-Identifier: Apache-2.0
"""Users' conversations: every accepted format, malformed record and broken file."""

import gzip
import json
import os
import pathlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data import conversations
from lm.data.conversations import Branch, Conversation, Message
from lm.errors import DataError, UserError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
GOOD = {"messages": [USER, ANSWER]}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def write(tmp_path, *records, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def read(tmp_path, *records, **options):
    return list(conversations.read_conversations(write(tmp_path, *records), **options))


def assistant(**keys):
    return {"role": "assistant", "content": "ok", **keys}


def test_openai_messages(tmp_path):
    record = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
            assistant(content=None, reasoning_content="why", tool_calls=[CALL]),
            {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f"},
            assistant(reasoning=""),
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "id": 7,
    }
    (got,) = read(tmp_path, record)
    assert got.messages == (
        Message("system", "be brief"),
        Message("user", "ab"),
        Message("assistant", "", thought="why", tool_calls=(CALL,)),
        Message("tool", "1", tool_call_id="c1", name="f"),
        Message("assistant", "ok", thought=""),
    )
    assert got.tools == tuple(record["tools"])
    assert got.file == str(tmp_path / "data.jsonl")
    assert got.line == 1
    assert got.num_turns == 2


def test_sharegpt(tmp_path):
    record = {
        "system": "be brief",
        "tools": '[{"name": "f"}]',
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "b", "reasoning": "why"},
            {"from": "human", "value": "c"},
            {"from": "gpt", "value": "<think>\nw\n</think>\n\nd"},
        ],
    }
    (got,) = read(tmp_path, record)
    assert got.messages == (
        Message("system", "be brief"),
        Message("user", "a"),
        Message("assistant", "", tool_calls=({"name": "f", "arguments": {"x": 1}},)),
        Message("tool", "1"),
        Message("assistant", "b", thought="why"),
        Message("user", "c"),
        Message("assistant", "d", thought="w"),
    )
    assert got.tools == ({"name": "f"},)


@pytest.mark.parametrize(
    ("content", "thought", "response"),
    [
        ("plain", None, "plain"),
        ("<think>a</think>b", "a", "b"),
        (" \n<think>\na\n\nb\n</think>\n\n c", "a\n\nb", " c"),
        ("<think></think>x", "", "x"),
        ("<think>\n\n</think>\n\n", "", ""),
        ("so <think>a</think>", None, "so <think>a</think>"),
        ("<think>a</think>b</think>", "a", "b</think>"),
        ("  padded ", None, "  padded "),
    ],
)
def test_inline_thought(tmp_path, content, thought, response):
    (got,) = read(tmp_path, {"messages": [USER, assistant(content=content)]})
    assert (got.messages[1].thought, got.messages[1].content) == (thought, response)


def test_delimiters(tmp_path):
    record = {"messages": [USER, assistant(content="[[a]]<think>b")]}
    (got,) = read(tmp_path, record, delimiters=("[[", "]]"))
    assert (got.messages[1].thought, got.messages[1].content) == ("a", "<think>b")
    (got,) = read(tmp_path, record, delimiters=None)
    assert (got.messages[1].thought, got.messages[1].content) == (None, "[[a]]<think>b")
    with pytest.raises(UserError, match="delimiters"):
        read(tmp_path, record, delimiters=("", "]]"))


def test_user_text_is_never_split(tmp_path):
    (got,) = read(tmp_path, {"messages": [{"role": "user", "content": "<think>a"}, ANSWER]})
    assert got.messages[0] == Message("user", "<think>a")


def test_empty_thought_is_not_no_thought():
    empty, none = Message("assistant", "x", thought=""), Message("assistant", "x")
    assert empty.to_dict(True) == {"role": "assistant", "content": "x", "reasoning_content": ""}
    assert empty.to_dict(False) == none.to_dict(True) == {"role": "assistant", "content": "x"}


def messages(*records):
    return {"messages": list(records)}


MALFORMED = {
    "list": ([1], "not a JSON object but a list"),
    "null": (None, "not a JSON object but null"),
    "shape": ({"prompt": "x", "completion": "y"}, "unknown shape"),
    "both_shapes": ({"messages": [USER, ANSWER], "conversations": []}, "both 'messages' and"),
    "messages_type": ({"messages": "x"}, "'messages' is a string, not a list"),
    "message_type": (messages(USER, "x"), r"messages\[1\]: not an object but a string"),
    "no_role": (messages({"content": "x"}, ANSWER), r"messages\[0\]: no 'role'"),
    "role": (messages({"role": "robot", "content": "x"}), 'unknown role "robot"'),
    "role_type": (messages({"role": ["user"], "content": "x"}), "unknown role"),
    "from": ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown 'from' \"alien\""),
    "no_value": ({"conversations": [{"from": "human"}]}, "no 'value'"),
    "no_content": (messages({"role": "user"}, ANSWER), r"messages\[0\]: no 'content'"),
    "content_number": (messages({"role": "user", "content": 3}), "content is a number"),
    "content_object": (messages({"role": "user", "content": {}}), "content is an object"),
    "image": (
        messages({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}),
        'content part 0 is "image_url"',
    ),
    "part": (messages({"role": "user", "content": ["x"]}), "content part 0 is not a text part"),
    "part_text": (messages({"role": "user", "content": [{"type": "text"}]}), "has no text"),
    "empty": (messages(), "no user message"),
    "no_user": (messages({"role": "system", "content": "x"}, ANSWER), "no user message"),
    "untrained": (messages(ANSWER, USER), "nothing to train"),
    "two_assistants": (messages(USER, ANSWER, ANSWER), "two assistant messages in a row"),
    "two_greetings": (messages(ANSWER, ANSWER, USER, ANSWER), "two assistant messages in a row"),
    "calls_without_result": (
        messages(USER, assistant(tool_calls=[CALL]), ANSWER),
        "two assistant messages in a row",
    ),
    "orphan_first": (messages({"role": "tool", "content": "1"}, USER, ANSWER), "without a tool"),
    "orphan_no_call": (messages(USER, ANSWER, {"role": "tool", "content": "1"}), "without a tool"),
    "orphan_after_user": (
        messages(USER, assistant(tool_calls=[CALL]), USER, {"role": "tool", "content": "1"}),
        "without a tool call before it at message 3",
    ),
    "orphan_id": (
        messages(
            USER,
            assistant(tool_calls=[CALL]),
            {"role": "tool", "content": "1", "tool_call_id": "c2"},
        ),
        'message 2 answers call "c2", which was not made',
    ),
    "unclosed": (messages(USER, assistant(content="<think>a")), "'<think>' is never closed"),
    "two_thoughts": (
        messages(USER, assistant(content="<think>a</think>b", reasoning_content="a")),
        "a thought both in its own key and inline",
    ),
    "two_keys": (messages(USER, assistant(reasoning="a", reasoning_content="b")), "differ"),
    "thought_type": (messages(USER, assistant(reasoning=3)), "'reasoning' is a number"),
    "user_thought": (messages({**USER, "reasoning": "a"}, ANSWER), "a thought on a user message"),
    "user_calls": (messages({**USER, "tool_calls": [CALL]}, ANSWER), "'tool_calls' on a user"),
    "calls_type": (messages(USER, assistant(tool_calls={})), "'tool_calls' is an object"),
    "calls_name": (messages(USER, assistant(tool_calls=[{"id": "1"}])), "names no function"),
    "calls_arguments": (
        messages(USER, assistant(tool_calls=[{"function": {"name": "f"}}])),
        "'arguments' is neither",
    ),
    "function_call": (messages(USER, assistant(function_call=CALL)), "use 'tool_calls'"),
    "functions": ({**GOOD, "functions": [{}]}, "use 'tools'"),
    "weight": (messages(USER, assistant(weight=0)), "'weight' 0 is not supported"),
    "train": (messages(USER, assistant(train=False)), "'train'"),
    "tools": ({**GOOD, "tools": {"f": 1}}, "'tools' is not a list of objects"),
    "tools_string": ({**GOOD, "tools": "f"}, "'tools' is a string that is not JSON"),
    "tools_surrogate": ({**GOOD, "tools": '[{"name": "\\ud800"}]'}, "half of a surrogate pair"),
    "tools_deep": ({**GOOD, "tools": "[" * 5000}, "'tools' is a string that is not JSON"),
    "system_type": ({**GOOD, "system": 3}, "'system' is a number"),
    "two_systems": (
        {"system": "a", "messages": [{"role": "system", "content": "b"}, USER, ANSWER]},
        "both a top-level 'system' and",
    ),
    "name": (messages({**USER, "name": 3}, ANSWER), "'name' is a number"),
    "share_call": ({"conversations": [{"from": "function_call", "value": "f()"}]}, "is not JSON"),
    "branches": ({**GOOD, "branches": {}}, "'branches' is an object"),
    "branch_at": ({**GOOD, "branches": [{"at": 3, "messages": [USER]}]}, "from 0 to 2, got 3"),
    "branch_at_bool": ({**GOOD, "branches": [{"at": True, "messages": [USER]}]}, "got true"),
    "branch_empty": ({**GOOD, "branches": [{"at": 1, "messages": []}]}, r"branches\[0\]: no mess"),
    "branch_role": (
        {**GOOD, "branches": [{"at": 1, "messages": [{"role": "x"}]}]},
        r"branches\[0\].messages\[0\]: unknown role",
    ),
    "branch_order": (
        {**GOOD, "branches": [{"at": 2, "messages": [ANSWER]}]},
        r"branches\[0\]: two assistant messages in a row at message 2",
    ),
}


@pytest.mark.parametrize(("record", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(tmp_path, record, reason):
    path = write(tmp_path, GOOD, record, GOOD)
    reader = conversations.read_conversations(path)
    assert next(reader).line == 1
    with pytest.raises(DataError, match=reason) as error:
        next(reader)
    assert (error.value.file, error.value.line) == (path, 2)
    assert str(error.value).startswith(f"{path}:2: ")

    reader = conversations.read_conversations(path, on_error="skip")
    assert [c.line for c in reader] == [1, 3]
    assert reader.skipped == 1
    assert reader.errors == [(2, error.value.reason)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [', "not JSON: Expecting value at column 15"),
        (b"hello", "not JSON"),
        (b'{"messages": "\xff"}', "not UTF-8 text at byte 14"),
        (b'{"a": ' * 100_000, "not JSON that can be read"),
        (b"[1, 2]", "not a JSON object but a list"),
        (
            b'{"messages":[{"role":"user","content":"\\ud800"},'
            b'{"role":"assistant","content":"a"}]}',
            "half of a surrogate pair",
        ),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_bad_line(tmp_path, line, reason, first):
    good = json.dumps(GOOD).encode()
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join([line, good] if first else [good, line]))
    with pytest.raises(DataError, match=reason) as error:
        list(conversations.read_conversations(path))
    assert error.value.line == (1 if first else 2)
    reader = conversations.read_conversations(path, on_error="skip")
    assert [c.line for c in reader] == [2 if first else 1]
    assert reader.skipped == 1


def test_whole_surrogate_pairs_are_text(tmp_path):
    (got,) = read(tmp_path, {"messages": [{"role": "user", "content": "\U0001f600"}, ANSWER]})
    assert got.messages[0].content == "\U0001f600"


def test_skips_are_logged(tmp_path, caplog):
    path = write(tmp_path, GOOD, {"messages": [ANSWER]})
    with caplog.at_level("WARNING", logger="absl"):
        list(conversations.read_conversations(path, on_error="skip"))
    assert [r.getMessage() for r in caplog.records] == [
        f"skipped {path}:2: no user message",
        f"{path}: skipped 1 of 2 records",
    ]


def test_greeting_is_context(tmp_path):
    (got,) = read(tmp_path, messages(ANSWER, USER, ANSWER))
    assert got.turns() == [(0, 2)]


def test_tool_results_in_a_row_and_inline_calls(tmp_path):
    result = {"role": "tool", "content": "1"}
    calls = [CALL, {**CALL, "id": "c2"}]
    (got,) = read(
        tmp_path,
        messages(USER, assistant(tool_calls=calls), {**result, "tool_call_id": "c2"}, result),
    )
    assert [m.role for m in got.messages] == ["user", "assistant", "tool", "tool"]
    read(tmp_path, messages(USER, assistant(content="<tool_call>f</tool_call>"), result, ANSWER))


def test_branches(tmp_path):
    record = {
        "system": "s",
        "messages": [USER, ANSWER, USER, ANSWER],
        "branches": [
            {"at": 3, "messages": [assistant(content="other")]},
            {"at": 0, "messages": [{"role": "user", "content": "edit"}, ANSWER]},
            {"at": 4, "messages": [USER, ANSWER]},
        ],
    }
    (got,) = read(tmp_path, record)
    main = got.messages
    assert got.branches[0] == Branch(4, (Message("assistant", "other"),))
    assert got.threads() == [
        main,
        (*main[:4], Message("assistant", "other")),
        (main[0], Message("user", "edit"), main[2]),
        (*main, main[1], main[2]),
    ]
    assert got.turns() == [(0, 2), (0, 4), (1, 4), (2, 2), (3, 6)]
    assert got.num_turns == 5


def test_a_main_thread_may_be_trained_by_its_branches_only(tmp_path):
    (got,) = read(tmp_path, {"messages": [USER], "branches": [{"at": 1, "messages": [ANSWER]}]})
    assert got.turns() == [(1, 1)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_lines(tmp_path, packed, bom, indent):
    text = "\n \n" + json.dumps([GOOD, {"messages": []}, GOOD], indent=indent) + "\n"
    path = tmp_path / "data.json"
    data = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    lines = [3, 3, 3]
    if indent:
        opens = [n for n, row in enumerate(text.split("\n"), 1) if row == "  {"]
        lines = [opens[0], opens[1], opens[2]]
    reader = conversations.read_conversations(path, on_error="skip")
    assert [c.line for c in reader] == [lines[0], lines[2]]
    assert reader.errors == [(lines[1], "no user message")]
    with pytest.raises(DataError, match="no user message") as error:
        list(conversations.read_conversations(path))
    assert error.value.line == lines[1]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[\n{},\n{"messages": ]\n]', 3, "the JSON array is broken: Expecting value"),
        ("[\nGOOD\nGOOD\n]", 3, "expected ',' or '\\]'"),
        ("[\nGOOD,\nGOOD\n", 4, "it ends without '\\]'"),
        ("[\nGOOD\n]\nGOOD", 4, "text after the end of the JSON array"),
        ("[GOOD,\n]", 2, "the JSON array is broken: Expecting value"),
    ],
)
def test_broken_array_is_fatal(tmp_path, text, line, reason, on_error):
    path = tmp_path / "data.json"
    path.write_text(text.replace("GOOD", json.dumps(GOOD)).replace("{}", json.dumps(GOOD)))
    with pytest.raises(DataError, match=reason) as error:
        list(conversations.read_conversations(path, on_error=on_error))
    assert error.value.line == line


def test_jsonl_with_bom_blank_lines_and_gzip(tmp_path):
    line = json.dumps(GOOD).encode()
    data = b"\xef\xbb\xbf\r\n" + line + b"\r\n\n  \n" + line
    for name, payload in [("a.jsonl", data), ("a.gz", gzip.compress(data, mtime=0))]:
        (tmp_path / name).write_bytes(payload)
        got = list(conversations.read_conversations(tmp_path / name))
        assert [c.line for c in got] == [2, 5]
    # Gzip is recognised by its content too, whatever the name.
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(data, mtime=0))
    assert len(list(conversations.read_conversations(tmp_path / "b.jsonl"))) == 2


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("empty.jsonl", b"", "no records: the file is empty"),
        ("blank.jsonl", b"\n \n", "no records: the file is empty"),
        ("empty.json", b"[ ]", "no records: the file is empty"),
        ("plain.gz", b'{"messages": []}', "bad gzip data: Not a gzipped file"),
        ("cut.gz", gzip.compress(json.dumps(GOOD).encode(), mtime=0)[:-20], "bad gzip data"),
        ("utf16.json", '[{"messages": []}]'.encode("utf-16"), ":1: not UTF-8 text"),
        ("array.json", b'[\n{"messages": "\xe9"}]', ":2: not UTF-8 text"),
    ],
)
def test_broken_file(tmp_path, name, data, reason):
    path = tmp_path / name
    path.write_bytes(data)
    for on_error in ("stop", "skip"):
        with pytest.raises(UserError, match=reason) as error:
            list(conversations.read_conversations(path, on_error=on_error))
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl: no such file"):
        conversations.read_conversations(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="is a directory"):
        conversations.read_conversations(tmp_path)


def test_nothing_usable(tmp_path):
    with pytest.raises(UserError, match=r"none of the 2 records .* the first: .*:1: no u"):
        read(tmp_path, messages(), messages(), on_error="skip")


def test_limit_and_bad_options(tmp_path):
    assert len(read(tmp_path, GOOD, GOOD, GOOD, limit=2)) == 2
    with pytest.raises(UserError, match="limit"):
        read(tmp_path, GOOD, limit=0)
    with pytest.raises(UserError, match="on_error must be one of stop, skip"):
        read(tmp_path, GOOD, on_error="ignore")


def test_jsonl_is_streamed(tmp_path):
    path = write(tmp_path, *[GOOD] * 2000)
    reader = conversations.read_conversations(path)
    next(reader)
    # What is left on disk beyond the read buffer has not been looked at yet.
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2 - 5)
    with pytest.raises(DataError, match="not JSON"):
        list(reader)
    assert reader.skipped == 0


def test_documented_examples(tmp_path):
    page = (pathlib.Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    got = [read(tmp_path, json.loads(example))[0] for example in examples]
    assert [c.num_turns for c in got] == [2, 1, 1, 3]
    assert [c.messages[-1].thought for c in got] == [None, "3*4=12", "Greet.", None]


text = st.text(max_size=5)
MESSAGE = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=text,
    thought=st.none() | text,
    tool_calls=st.just(()) | st.just((CALL,)),
    tool_call_id=st.none() | text,
    name=st.none() | text,
)
THREAD = st.lists(MESSAGE, max_size=3).map(tuple)


@given(
    st.builds(
        Conversation,
        messages=THREAD,
        tools=st.none() | st.just(({"name": "f"},)),
        branches=st.lists(st.builds(Branch, st.integers(0, 3), THREAD), max_size=2).map(tuple),
        file=text,
        line=st.integers(0, 9),
    )
)
def test_json_round_trip(conversation):
    line = conversation.to_json()
    assert "\n" not in line
    assert Conversation.from_json(line) == conversation
    assert Conversation.from_json(line.encode()) == conversation
