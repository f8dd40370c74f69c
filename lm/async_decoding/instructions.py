# SPDX-License-Identifier: Apache-2.0
"""Prompts and instruction data in the forms that people have them in: AlpacaEval's list of prompts,
JSONL with an instruction and an output, and every form of conversation.

| fields of a record | becomes |
|---|---|
| `instruction`, `input`?, `output`? | a user's message, with the input below; an answer |
| `prompt`, `reference`? | the same |
| `messages` or `conversations` | what `lm.data.records` makes of it |
"""

import os
from collections.abc import Mapping
from typing import Any

from lm.data.conversations import RecordReader
from lm.data.messages import Conversation, Message
from lm.data.records import Malformed, parse_record

_WHOLE = ("messages", "conversations")  # a record with these has answers beside its prompt
_FORMS = (("instruction", "output"), ("prompt", "reference"))


def read(
    path: str | os.PathLike[str], *, on_error: str = "stop", limit: int | None = None
) -> RecordReader[Conversation]:
    """Streams the conversations of a file: JSONL or a JSON list, plain or gzip. Records without an
    answer are conversations of one message.

    Raises UserError and DataError, as `lm.data.conversations.read_conversations` does.
    """
    file = os.fspath(path)
    return RecordReader(
        file, lambda record, line: parse(record, file, line), on_error=on_error, limit=limit
    )


def parse(record: Any, file: str = "", line: int = 0) -> Conversation:
    """One record; `Malformed` with the reason when it is none of the forms."""
    plain = isinstance(record, Mapping) and not any(record.get(key) for key in _WHOLE)
    names = next((form for form in _FORMS if plain and form[0] in record), None)
    if names is None:
        return parse_record(record, file=file, line=line)
    asked, answer = _text(record, names[0]), _text(record, names[1], missing="")
    if more := _text(record, "input", missing=""):
        asked = f"{asked}\n\n{more}"
    if not asked.strip():
        raise Malformed(f"{names[0]} is empty")
    messages = (Message("user", asked), *((Message("assistant", answer),) if answer else ()))
    return Conversation(messages, file=file, line=line)


def _text(record: Mapping[str, Any], name: str, missing: str | None = None) -> str:
    value = record.get(name)
    if value is None and missing is not None:
        return missing
    if not isinstance(value, str):
        raise Malformed(f"{name} must be a text, not {type(value).__name__}")
    return value
