# SPDX-License-Identifier: Apache-2.0
"""One conversation that a model holds itself, message by message, with the reference's other side.

The history that the model sees holds its own earlier responses, its own thoughts dropped or kept by
the same policy that training follows; user messages and tool results are the reference's. In a tool
loop the reference's result follows the model's own call, and the last message of the turn is
scored. The depth of a message is the number of the user's turn that it answers, from 1.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm import setup
from lm.config import DataConfig
from lm.data import arithmetic, gsm8k
from lm.data.conversations import Conversation, Message
from lm.errors import DataError, UserError
from lm.generate import Generation
from lm.single_pass import samples


@dataclasses.dataclass(frozen=True)
class Reply:
    """One message that the model wrote, beside the one that it should have written."""

    depth: int
    text: str  # all that was generated
    thought: str | None
    response: str
    reference: str
    closed: bool  # the thought, if there is one, came to its end
    stopped: bool  # at a stop token, not at max_new_tokens
    tokens: int
    correct: bool | None  # None: not scored, a step of a tool loop


@dataclasses.dataclass(frozen=True)
class Transcript:
    """A conversation as it went: the model's replies among the reference's other messages."""

    file: str
    line: int
    messages: tuple[Message, ...]
    replies: tuple[Reply, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "file": self.file,
            "line": self.line,
            "messages": [message.to_dict(with_thought=True) for message in self.messages],
            "replies": [dataclasses.asdict(reply) for reply in self.replies],
        }


class Dialogue:
    """One conversation in progress."""

    def __init__(
        self,
        resolved: setup.Setup,
        conversation: Conversation,
        index: int,
        own: Sequence[samples.Sample],
    ):
        self.index = index
        self._resolved, self._conversation = resolved, conversation
        # thoughts go where training puts them: the renderings of the reference know
        self._inline = any(sample.rendering.inline for sample in own)
        self._trained = {sample.message for sample in own if sample.thread == 0}
        self._depths = depths_of(conversation.messages)
        self._messages: list[Message] = []
        self._replies: list[Reply] = []
        self._texts: dict[int, str] = {}  # by message, what the model wrote, when it is complete
        self._prompt = ""
        self._follow()

    @property
    def open(self) -> bool:
        """Whether a message is left to write."""
        return len(self._messages) < len(self._conversation.messages)

    def _follow(self) -> None:
        """Takes over what is not the model's, up to its next message or the end."""
        while self.open and len(self._messages) not in self._trained:
            self._messages.append(self._conversation.messages[len(self._messages)])

    def prompt(self) -> np.ndarray:
        """The ids that the next message is generated from."""
        data, place = self._resolved.config.data, len(self._messages)
        thread = (*self._messages, self._conversation.messages[place])
        kept = samples.keeps_thoughts(thread, place, data.policy)
        shown = [self._shown(index, keep) for index, keep in enumerate(kept[:-1])]
        try:
            self._prompt = self._resolved.template.render(
                shown, add_generation_prompt=True, tools=self._conversation.tools
            )
            return self._resolved.tokenizer.encode(self._prompt)
        except UserError as error:
            where = self._conversation
            raise DataError(where.file, where.line, f"message {place}: {error}") from None

    def _shown(self, index: int, keep: bool) -> dict[str, Any]:
        message = self._messages[index]
        if self._inline and keep and index in self._texts:
            # the content is the thought and all, so the model's own spacing can stay
            return {"role": "assistant", "content": self._texts[index]}
        return samples.as_dict(message, keep, self._inline, self._resolved.delimiters)

    def write(self, generation: Generation) -> None:
        """Takes the model's message into the history and goes on to its next one."""
        place = len(self._messages)
        reference = self._conversation.messages[place]
        text = self._resolved.tokenizer.decode(generation.tokens)
        opened = self._prompt.rstrip().endswith(self._resolved.delimiters[0])
        thought, response, closed = split_generation(text, self._resolved.delimiters, opened)
        correct = None
        if is_scored(self._conversation.messages, place):
            correct = closed and matches(self._resolved.config.data, response, reference.content)
        if thought is not None and not opened:
            self._texts[place] = text
        self._messages.append(Message("assistant", response, thought=thought))
        self._replies.append(
            Reply(
                depth=self._depths[place],
                text=text,
                thought=thought,
                response=response,
                reference=reference.content,
                closed=closed,
                stopped=generation.stopped,
                tokens=len(generation.tokens),
                correct=correct,
            )
        )
        self._follow()

    def transcript(self) -> Transcript:
        where = self._conversation
        return Transcript(where.file, where.line, tuple(self._messages), tuple(self._replies))


def split_generation(
    text: str, delimiters: tuple[str, str], opened: bool = False
) -> tuple[str | None, str, bool]:
    """(thought, response, closed) of what a model wrote.

    opened: the prompt ends with the opening delimiter, as some templates have it. A thought that
    never closes leaves the whole text as the response.
    """
    opening, closing = delimiters
    body = text.lstrip()
    if body.startswith(opening):
        body = body.removeprefix(opening)
    elif not opened:
        return None, text, True
    thought, found, response = body.partition(closing)
    if not found:
        return None, text, False
    return thought.strip("\n"), response.lstrip("\n"), True


def depths_of(thread: Sequence[Message]) -> list[int]:
    """Per message, the user's turn that it belongs to, from 1; 0 before the first.

    User messages in a row are one turn.
    """
    depths, depth, previous = [], 0, ""
    for message in thread:
        depth += message.role == "user" and previous != "user"
        previous = message.role
        depths.append(depth)
    return depths


def is_scored(thread: Sequence[Message], index: int) -> bool:
    """Whether an assistant message ends its turn with a response, instead of calling a tool."""
    called = index + 1 < len(thread) and thread[index + 1].role == "tool"
    return not called and not thread[index].tool_calls


def matches(data: DataConfig, response: str, reference: str) -> bool:
    """Whether a response gives the reference's answer: by value, else by text.

    Arithmetic and GSM8K responses state a number. Other texts are compared as a whole, with runs of
    white space taken for one space and without regard to case.
    """
    answer = _answer_of(data.source)
    expected = None if answer is None else answer(reference)
    if answer is None or expected is None:
        return _normalised(response) == _normalised(reference)
    return answer(response) == expected


def _answer_of(source: str) -> Callable[[str], str | None] | None:
    if source == "arithmetic":
        return arithmetic.answer
    return gsm8k.answer if source.startswith("gsm8k:") else None


def _normalised(text: str) -> str:
    return " ".join(text.split()).casefold()
