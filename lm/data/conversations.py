# SPDX-License-Identifier: Apache-2.0
"""Files of conversations. Read: JSONL or a JSON array, plain or gzip, OpenAI or ShareGPT; written:
JSONL, OpenAI.

JSONL is streamed line by line; a JSON array is held as text and decoded record by record.
"""

import dataclasses
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Self, TypeVar

from absl import logging

from lm.data.messages import Branch, Conversation, Message
from lm.data.records import Delimiters, Malformed, parse_record
from lm.errors import DataError, RunError, UserError

__all__ = [
    "Branch",
    "Conversation",
    "Message",
    "RecordReader",
    "read_conversations",
    "write_conversations",
]

T = TypeVar("T")

ON_ERROR = ("stop", "skip")
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_SPACE = re.compile(r"[ \t\r\n]*")


def read_conversations(
    path: str | os.PathLike[str],
    *,
    on_error: str = "stop",
    delimiters: Delimiters = ("<think>", "</think>"),
    limit: int | None = None,
) -> "RecordReader[Conversation]":
    """Streams the conversations of one file, each with its file and line.

    on_error: "stop" raises `DataError` (FILE:LINE: reason) at the first malformed record; "skip"
      logs it, counts it in the reader's `skipped`, and goes on.
    delimiters: around thoughts at the start of an assistant's content; None leaves contents alone.
    limit: at most so many conversations.

    Raises:
      UserError: the file is missing, a directory, empty, not gzip though it says so, or holds no
        usable record; or an argument is wrong. A JSON array with broken syntax, or one that is not
        UTF-8, is an error under both `on_error` since the rest of the file cannot be read.
    """
    if delimiters is not None and not (len(delimiters) == 2 and all(delimiters)):
        raise UserError(f"delimiters must be two non-empty strings, got {delimiters!r}")
    file = os.fspath(path)

    def parse(record: Any, line: int) -> Conversation:
        return parse_record(record, delimiters, file, line)

    return RecordReader(file, parse, on_error=on_error, limit=limit)


def write_conversations(path: str | os.PathLike[str], conversations: Iterable[Conversation]) -> int:
    """Writes conversations for `read_conversations`, all of them or no file; returns how many.

    Where they came from is not written: a file has lines of its own. Raises RunError.
    """
    partial, count = f"{os.fspath(path)}.partial", 0
    try:
        with open(partial, "w", encoding="utf-8") as file:
            for conversation in conversations:
                file.write(dataclasses.replace(conversation, file="", line=0).to_json() + "\n")
                count += 1
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
    return count


class RecordReader(Iterator[T], Generic[T]):
    """An iterator over the records of one file that knows what it left out.

    parse: (record, line) -> what the reader yields; it raises `Malformed` with a reason.
    skipped: how many malformed records were skipped so far; errors: (line, reason) of each.
    """

    def __init__(
        self,
        path: str,
        parse: Callable[[Any, int], T],
        *,
        on_error: str = "stop",
        limit: int | None = None,
    ):
        if on_error not in ON_ERROR:
            raise UserError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
        if limit is not None and limit < 1:
            raise UserError(f"limit must be at least 1, got {limit}")
        check_file(path)
        self.path = path
        self.errors: list[tuple[int, str]] = []
        self._parse, self._on_error, self._limit = parse, on_error, limit
        self._records = self._read()

    @property
    def skipped(self) -> int:
        return len(self.errors)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        return next(self._records)

    def _read(self) -> Iterator[T]:
        count = 0
        for line, record in decode_records(self.path):
            try:
                if isinstance(record, Malformed):
                    raise record
                parsed = self._parse(record, line)
            except Malformed as error:
                if self._on_error == "stop":
                    raise DataError(self.path, line, str(error)) from None
                self.errors.append((line, str(error)))
                logging.warning("skipped %s:%d: %s", self.path, line, error)
                continue
            count += 1
            yield parsed
            if count == self._limit:
                break
        if self.skipped:
            total = count + self.skipped
            logging.warning("%s: skipped %d of %d records", self.path, self.skipped, total)
        if not count:
            if not self.errors:
                raise UserError(f"{self.path}: no records: the file is empty")
            line, reason = self.errors[0]
            raise UserError(
                f"{self.path}: none of the {self.skipped} records can be used; the first:"
                f" {self.path}:{line}: {reason}"
            )


def decode_records(path: str) -> Iterator[tuple[int, Any]]:
    """Yields (line, record) of a JSONL file or a JSON array, `Malformed` for a bad line.

    Raises `UserError` when the file as a whole cannot be read.
    """
    lines = ((number, line) for number, line in _lines(path) if line.strip())
    head = list(itertools.islice(lines, 2))
    if head and head[0][1].lstrip().startswith(b"[") and not _is_jsonl(head):
        # Blank lines count too, so the array is read anew, from its own line on.
        whole = b"".join(line for number, line in _lines(path) if number >= head[0][0])
        yield from _array(whole, path, head[0][0])
        return
    for number, line in itertools.chain(head, lines):
        yield number, _decode(line)


def _is_jsonl(head: Sequence[tuple[int, bytes]]) -> bool:
    """A first line that is a whole list with more lines after it is a bad JSONL record."""
    return len(head) > 1 and not isinstance(_decode(head[0][1]), Malformed)


def check_file(path: str) -> None:
    """Raises `UserError` when `path` is not a file that can be read."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if os.path.isdir(path):
        raise UserError(f"{path}: is a directory, not a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read it")


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """The file's lines with their numbers, decompressed, without a byte-order mark."""
    number = 0
    try:
        with open(path, "rb") as raw:
            packed = path.endswith(".gz") or raw.peek(2)[:2] == _GZIP
            stream: Iterable[bytes] = gzip.open(raw) if packed else raw  # noqa: SIM115
            for number, line in enumerate(stream, start=1):
                yield number, line.removeprefix(_BOM) if number == 1 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        after = f" after line {number}" if number else ""
        raise UserError(f"{path}: bad gzip data{after}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _decode(line: bytes) -> Any:
    try:
        text = line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        return Malformed(f"not UTF-8 text at byte {error.start}")
    try:
        return _check_unicode(text, json.loads(text))
    except json.JSONDecodeError as error:
        return Malformed(f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Malformed(f"not JSON that can be read: {error}")


def _array(data: bytes, path: str, line: int) -> Iterator[tuple[int, Any]]:
    """The records of a JSON array that starts on `line`, each with the line where it starts."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(path, line, "not UTF-8 text") from None
    decoder = json.JSONDecoder()
    counted = 0
    position = _skip_space(text, text.index("[") + 1)
    closed = text.startswith("]", position)
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, end = decoder.raw_decode(text, position)
            record = _check_unicode(text[position:end], record)
        except json.JSONDecodeError as error:
            line += text.count("\n", position, error.pos)
            raise DataError(path, line, f"the JSON array is broken: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(path, line, f"not JSON that can be read: {error}") from None
        yield line, record
        position = _skip_space(text, end)
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            line += text.count("\n", counted, position)
            reason = "expected ',' or ']'" if position < len(text) else "it ends without ']'"
            raise DataError(path, line, f"the JSON array is broken: {reason}")
        if not closed:
            position = _skip_space(text, position + 1)
    position = _skip_space(text, position + 1)
    if position < len(text):
        line += text.count("\n", counted, position)
        raise DataError(path, line, "text after the end of the JSON array")


def _skip_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()


def _check_unicode(text: str, record: Any) -> Any:
    r"""Only \uXXXX escapes can make half a character, which no tokenizer or file can take."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Malformed("not valid Unicode: half of a surrogate pair")
    return record
