# SPDX-License-Identifier: Apache-2.0
"""GSM8K word problems (a local JSONL file) -> multi-turn conversations.

A record is {"question": ..., "answer": "step\\nstep\\n#### 72"}. Each problem becomes a turn: the
user asks the question, the solution's steps are the thought, the response is "The answer is 72."
"""

import dataclasses
import decimal
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm.data.conversations import RecordReader
from lm.data.messages import Conversation, Message
from lm.data.records import Malformed
from lm.errors import UserError

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_NUMBER = r"-?\d+(?:\.\d+)?"
_STATED = re.compile(rf"answer is:?\s*({_NUMBER})(?![\d.]*\d)")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A word problem: solution is its steps without calculator annotations, answer a number."""

    question: str
    solution: str
    answer: str
    line: int


def read_problems(
    path: str | os.PathLike[str], *, on_error: str = "stop", limit: int | None = None
) -> RecordReader[Problem]:
    """Streams the problems of a GSM8K file; options and errors as in `read_conversations`."""
    return RecordReader(os.fspath(path), parse_problem, on_error=on_error, limit=limit)


def parse_problem(record: Any, line: int) -> Problem:
    """Reads one decoded record. Raises `Malformed` with the reason."""
    if not isinstance(record, dict):
        raise Malformed("not a JSON object")
    for key in ("question", "answer"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise Malformed(f"no text under '{key}'")
    solution, mark, final = record["answer"].rpartition("####")
    if not mark:
        raise Malformed("'answer' has no line '#### NUMBER'")
    number = _plain(final.strip())
    if not re.fullmatch(_NUMBER, number):
        raise Malformed(f"the final answer {final.strip()!r} is not a number")
    solution = _ANNOTATION.sub("", solution).strip()
    return Problem(record["question"].strip(), solution, number, line)


def conversations_of(
    problems: Sequence[Problem], *, per_conversation: int = 4, seed: int = 0, file: str = ""
) -> Iterator[Conversation]:
    """Groups the problems, in an order drawn from `seed`; every problem is used exactly once.

    The last conversation holds what is left. A conversation's line is that of its first problem.
    """
    if per_conversation < 1:
        raise UserError(f"problems_per_conversation must be at least 1, got {per_conversation}")
    order = np.random.default_rng(seed).permutation(len(problems))
    for start in range(0, len(order), per_conversation):
        chosen = [problems[i] for i in order[start : start + per_conversation]]
        messages = []
        for problem in chosen:
            messages += [
                Message("user", problem.question),
                Message("assistant", response(problem.answer), thought=problem.solution),
            ]
        yield Conversation(tuple(messages), file=file, line=chosen[0].line)


def response(number: str) -> str:
    """The response that states a final answer."""
    return f"The answer is {number}."


def answer(content: str) -> str | None:
    """The final answer that a response states, as a plain number: of "$1,200.00" 1200."""
    found = _STATED.findall(_plain(content))
    return format(decimal.Decimal(found[-1]).normalize(), "f") if found else None


def expected(conversation: Conversation) -> list[str | None]:
    """The right answer of each assistant message of the main thread."""
    return [answer(m.content) for m in conversation.messages if m.role == "assistant"]


def _plain(text: str) -> str:
    """Without dollar signs and the commas between digits."""
    return re.sub(r"(?<=\d),(?=\d)", "", text.replace("$", ""))
