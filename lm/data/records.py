# SPDX-License-Identifier: Apache-2.0
"""One JSON record -> one `Conversation`, or the reason why not.

Keys that are read: at the top level `messages` or `conversations`, `system`, `tools`, `branches`;
in an OpenAI message `role`, `content`, `reasoning_content` or `reasoning`, `tool_calls`,
`tool_call_id`, `name`; a ShareGPT message has `from` and `value` instead of `role` and `content`.
Other keys are allowed and have no effect, except for those that ask for something that is not done
(`functions`, `function_call`, a `weight` other than 1, `train: false`): these make the record
malformed.
"""

import json
from collections.abc import Sequence
from typing import Any

from lm.data.messages import ROLES, Branch, Conversation, Message

Delimiters = tuple[str, str] | None

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")
# Text that some ShareGPT sets write instead of structured calls; a tool result may follow it.
_INLINE_CALL = "<tool_call>"


class Malformed(ValueError):
    """The record cannot be used; the message is the reason, without file and line."""


def parse_record(
    record: Any,
    delimiters: Delimiters = ("<think>", "</think>"),
    file: str = "",
    line: int = 0,
) -> Conversation:
    """Reads a decoded JSON record. Raises `Malformed` with the reason.

    delimiters: around a thought at the start of an assistant's content; None leaves contents alone.
    """
    if not isinstance(record, dict):
        raise Malformed(f"not a JSON object but {_kind(record)}")
    keys = [key for key in ("messages", "conversations") if record.get(key) is not None]
    if len(keys) != 1:
        raise Malformed(
            "both 'messages' and 'conversations' are present"
            if keys
            else "unknown shape: neither 'messages' (OpenAI) nor 'conversations' (ShareGPT)"
        )
    if record.get("functions"):
        raise Malformed("'functions' is not supported; use 'tools'")
    system = _system(record.get("system"))
    messages = system + _messages(record[keys[0]], keys[0], delimiters)
    if system and any(m.role == "system" for m in messages[1:]):
        raise Malformed(f"both a top-level 'system' and a system message in '{keys[0]}'")
    conversation = Conversation(
        messages=messages,
        tools=_tools(record.get("tools")),
        branches=_branches(record.get("branches"), len(system), len(messages), delimiters),
        file=file,
        line=line,
    )
    for number, thread in enumerate(conversation.threads()):
        _check_order(thread, f"branches[{number - 1}]: " if number else "")
    if not conversation.num_turns:
        raise Malformed("no assistant message after a user message: nothing to train")
    return conversation


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


def _decoded(text: str, what: str) -> Any:
    """The value of JSON in a string of a record. Raises Malformed."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Malformed(f"{what} that holds half of a surrogate pair") from None
    except (ValueError, RecursionError):
        raise Malformed(f"{what} that is not JSON") from None
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _system(value: Any) -> tuple[Message, ...]:
    if value is None or value == "":
        return ()
    if not isinstance(value, str):
        raise Malformed(f"'system' is {_kind(value)}, not a string")
    return (Message("system", value),)


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """A list of tools, or a string that holds one as JSON; an empty list is no tools."""
    if isinstance(value, str) and value.strip():
        value = _decoded(value, "'tools' is a string")
    if value is None or value == [] or value == "":
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Malformed("'tools' is not a list of objects")
    return tuple(value)


def _messages(value: Any, where: str, delimiters: Delimiters) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise Malformed(f"'{where}' is {_kind(value)}, not a list")
    out = []
    for index, message in enumerate(value):
        try:
            out.append(_message(message, delimiters))
        except Malformed as error:
            raise Malformed(f"{where}[{index}]: {error}") from None
    return tuple(out)


def _branches(value: Any, offset: int, length: int, delimiters: Delimiters) -> tuple[Branch, ...]:
    """`at` counts the record's own messages; `offset` shifts it past a top-level system message."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise Malformed(f"'branches' is {_kind(value)}, not a list")
    out = []
    for index, branch in enumerate(value):
        where = f"branches[{index}]"
        if not isinstance(branch, dict):
            raise Malformed(f"{where}: not an object but {_kind(branch)}")
        at = branch.get("at")
        if type(at) is not int or not 0 <= at <= length - offset:
            raise Malformed(
                f"{where}: 'at' must be an integer from 0 to {length - offset}, got {_shown(at)}"
            )
        messages = _messages(branch.get("messages"), f"{where}.messages", delimiters)
        if not messages:
            raise Malformed(f"{where}: no messages")
        out.append(Branch(at + offset, messages))
    return tuple(out)


def _message(record: Any, delimiters: Delimiters) -> Message:
    if not isinstance(record, dict):
        raise Malformed(f"not an object but {_kind(record)}")
    _refuse(record)
    role, content, calls = _sharegpt(record) if "from" in record else _openai(record)
    thought = _thought(record)
    if role != "assistant":
        if thought:
            raise Malformed(f"a thought on a {role} message")
        if calls:
            raise Malformed(f"'tool_calls' on a {role} message")
        thought = None
    elif delimiters is not None:
        thought, content = _split_thought(thought, content, delimiters)
    return Message(
        role=role,
        content=content,
        thought=thought,
        tool_calls=calls,
        tool_call_id=_optional_string(record, "tool_call_id"),
        name=_optional_string(record, "name"),
    )


def _refuse(record: dict[str, Any]) -> None:
    """Keys that ask for something that we would otherwise silently not do."""
    if record.get("function_call"):
        raise Malformed("'function_call' is not supported; use 'tool_calls'")
    if record.get("weight", 1) not in (1, None):
        raise Malformed(f"'weight' {_shown(record['weight'])} is not supported: messages weigh 1")
    if record.get("train") is False:
        raise Malformed("'train': false is not supported: every assistant message is trained")


def _openai(record: dict[str, Any]) -> tuple[Any, str, tuple[dict[str, Any], ...]]:
    if record.get("role") is None:
        raise Malformed("no 'role'")
    role = record["role"]
    if role == "developer":  # OpenAI's newer name for the same thing
        role = "system"
    if role not in ROLES:
        raise Malformed(f"unknown role {_shown(role)}")
    if "content" not in record and not record.get("tool_calls"):
        raise Malformed("no 'content'")
    return role, _content(record.get("content")), _calls(record.get("tool_calls"))


def _sharegpt(record: dict[str, Any]) -> tuple[Any, str, tuple[dict[str, Any], ...]]:
    speaker = record["from"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise Malformed(f"unknown 'from' {_shown(speaker)}")
    if "value" not in record:
        raise Malformed("no 'value'")
    calls = _calls(record.get("tool_calls"))
    if speaker not in _CALLS:
        return SHAREGPT_ROLES[speaker], _content(record["value"]), calls
    value = record["value"]
    if isinstance(value, str):
        value = _decoded(value, f"the value of a {speaker} is one")
    if not value:
        raise Malformed(f"the value of a {speaker} holds no call")
    return "assistant", "", calls + _calls(value if isinstance(value, list) else [value])


def _content(value: Any) -> str:
    """A string, null (empty), or a list of text parts, which join without a separator."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if not isinstance(value, list):
        raise Malformed(f"content is {_kind(value)}, not a string, null or a list of text parts")
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type", "text"), str):
            raise Malformed(f"content part {index} is not a text part")
        if part.get("type", "text") != "text":
            raise Malformed(
                f"content part {index} is {_shown(part['type'])}: only text is accepted"
            )
        if not isinstance(part.get("text"), str):
            raise Malformed(f"content part {index} has no text")
        texts.append(part["text"])
    return "".join(texts)


def _calls(value: Any) -> tuple[dict[str, Any], ...]:
    """Calls stay as given: nested under `function` or flat, `arguments` an object or a string."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise Malformed(f"'tool_calls' is {_kind(value)}, not a list")
    for index, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Malformed(f"tool_calls[{index}] names no function")
        if not isinstance(function.get("arguments"), dict | str):
            raise Malformed(f"tool_calls[{index}]: 'arguments' is neither an object nor a string")
        if not isinstance(call.get("id"), str | None):
            raise Malformed(f"tool_calls[{index}]: 'id' is not a string")
    return tuple(value)


def _optional_string(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise Malformed(f"'{key}' is {_kind(value)}, not a string")
    return value


def _thought(record: dict[str, Any]) -> str | None:
    given = [_optional_string(record, key) for key in ("reasoning_content", "reasoning")]
    thoughts = {thought for thought in given if thought is not None}
    if len(thoughts) > 1:
        raise Malformed("'reasoning_content' and 'reasoning' differ")
    return thoughts.pop() if thoughts else None


def _split_thought(
    thought: str | None, content: str, delimiters: tuple[str, str]
) -> tuple[str | None, str]:
    """Moves a thought at the start of the content out of it.

    The newlines that templates put around the delimiters belong to neither of the two.
    """
    opening, closing = delimiters
    text = content.lstrip()
    if not text.startswith(opening):
        return thought, content
    if thought is not None:
        raise Malformed(f"a thought both in its own key and inline after {opening!r}")
    inner, found, response = text[len(opening) :].partition(closing)
    if not found:
        raise Malformed(f"{opening!r} is never closed by {closing!r}")
    return inner.strip("\n"), response.lstrip("\n")


def _check_order(thread: Sequence[Message], where: str) -> None:
    """No user message, two assistant messages in a row, and orphan tool results are malformed."""
    if not any(m.role == "user" for m in thread):
        raise Malformed(f"{where}no user message")
    previous = caller = None
    for index, message in enumerate(thread):
        if message.role == "assistant":
            if previous == "assistant":
                raise Malformed(f"{where}two assistant messages in a row at message {index}")
            calls = message.tool_calls or _INLINE_CALL in message.content
            caller = message if calls else None
        elif message.role != "tool":
            caller = None
        elif caller is None:
            raise Malformed(
                f"{where}a tool result without a tool call before it at message {index}"
            )
        elif message.tool_call_id is not None:
            ids = {call["id"] for call in caller.tool_calls if call.get("id") is not None}
            if ids and message.tool_call_id not in ids:
                raise Malformed(
                    f"{where}message {index} answers call {_shown(message.tool_call_id)}, which was"
                    " not made"
                )
        previous = message.role
