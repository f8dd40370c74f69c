# SPDX-License-Identifier: Apache-2.0
"""The N training samples of a conversation, as its chat template would show them at inference time.

For the assistant message k the prompt is the history rendered with the generation prompt, and the
completion is what the rendering of history and message k adds to it. Both are tokenised apart, as
at inference time, where the prompt is encoded before the first token of the answer exists.

Generation stops at the end-of-turn token, so a completion ends there. What the template writes
after it (ChatML's newline) is not trained and not in the sample; later prompts have it.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from lm.data.conversations import Conversation, Message
from lm.errors import DataError, UserError
from lm.text.chat import ChatTemplate
from lm.text.tokenizers import Tokenizer

POLICIES = ("interleaved", "preserved", "per_message")
DELIMITERS = ("<think>", "</think>")

_said: set[tuple[str, ...]] = set()


@dataclasses.dataclass(frozen=True, eq=False)
class Rendering:
    """The texts of a sample, and what it takes to tell which characters are whose."""

    prompt: str
    completion: str  # up to the end of turn
    thread: tuple[Message, ...]  # the history and the message itself
    kept: tuple[bool, ...]  # per message, whether its thought was given to the template
    inline: bool  # thoughts stand in the content, since the template ignores reasoning_content
    delimiters: tuple[str, str]
    tools: tuple[dict[str, Any], ...] | None
    template: ChatTemplate
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One assistant message with its context: `tokens[prompt_length:]` are trained."""

    tokens: np.ndarray  # [n] int32
    prompt_length: int
    turn: int  # 0-based, among the trained messages of its thread
    conversation: Conversation | None = None
    thread: int = 0  # in conversation.threads()
    message: int = -1  # in that thread; -1: unknown
    skipped: int = 0  # tokens cut from the left to fit a row
    thought_length: int | None = None  # trained tokens before the response; None: see the rendering
    rendering: Rendering | None = dataclasses.field(default=None, repr=False)

    @property
    def file(self) -> str:
        return self.conversation.file if self.conversation and self.conversation.file else "samples"

    @property
    def line(self) -> int:
        return self.conversation.line if self.conversation else 0

    @property
    def num_trained(self) -> int:
        return len(self.tokens) - self.prompt_length


def samples_of(
    conversation: Conversation,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    policy: str = "interleaved",
    delimiters: tuple[str, str] = DELIMITERS,
) -> list[Sample]:
    """One sample per trained assistant message of all threads, shared messages once.

    Args:
      policy: which earlier messages keep their thought. "interleaved": those since the last message
        of the user, hence all of the current tool loop; "preserved": all; "per_message": none.
        The message that is trained always has its own. Where the template has another rule for
        the history, it wins, which is logged once.
      delimiters: put around a thought in the content when the template ignores
        `reasoning_content`.

    Raises:
      UserError: unknown policy.
      DataError: the template refuses the conversation, drops the message's own thought, or renders
        a prompt that is not a prefix of the whole.
    """
    if policy not in POLICIES:
        raise UserError(f"policy={policy!r} is not one of {', '.join(POLICIES)}")
    renderer = _Renderer(conversation, template, tokenizer, policy, delimiters)
    turns = conversation.turns()
    try:
        renderings = [renderer.render(thread, index) for thread, index in turns]
        texts = [text for r in renderings for text in (r.prompt, r.completion)]
        ids = tokenizer.encode_batch(texts)
    except DataError:
        raise
    except UserError as error:
        raise DataError(conversation.file, conversation.line, str(error)) from None
    return [
        renderer.sample(thread, index, rendering, prompt, completion)
        for (thread, index), rendering, prompt, completion in zip(
            turns, renderings, ids[::2], ids[1::2], strict=True
        )
    ]


def keeps_thoughts(thread: Sequence[Message], index: int, policy: str) -> tuple[bool, ...]:
    """Per message of thread[: index + 1], whether it keeps its thought when `index` is trained."""
    users = [j for j in range(index) if thread[j].role == "user"]
    first = {"interleaved": max(users, default=-1), "preserved": -1, "per_message": index - 1}
    return tuple(j > first[policy] for j in range(index + 1))


class _Renderer:
    """Renders the turns of one conversation."""

    def __init__(
        self,
        conversation: Conversation,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        policy: str,
        delimiters: tuple[str, str],
    ):
        self._conversation = conversation
        self._template = template
        self._tokenizer = tokenizer
        self._policy = policy
        self._delimiters = delimiters
        self._threads = conversation.threads()
        self._inline = False  # once a thought had to go into the content, all do

    def render(self, thread: int, index: int) -> Rendering:
        """The texts of one turn; raises DataError when the template cannot show it."""
        messages = self._threads[thread][: index + 1]
        kept = keeps_thoughts(messages, index, self._policy)
        thought = messages[index].thought
        reason = ""
        attempts = (self._inline,) if thought is None or self._inline else (False, True)
        for inline in attempts:
            prompt, whole = self._texts(messages, kept, inline)
            if not whole.startswith(prompt):
                reason = _difference(prompt, whole)
                continue
            rendering = Rendering(
                prompt=prompt,
                completion=whole[len(prompt) :],
                thread=messages,
                kept=kept,
                inline=inline,
                delimiters=self._delimiters,
                tools=self._conversation.tools,
                template=self._template,
                tokenizer=self._tokenizer,
            )
            if thought is None or self._shows_own_thought(rendering, whole):
                self._inline = inline
                self._check_history(rendering)
                return rendering
            reason = (
                "the template drops the thought of the very message that it belongs to, as"
                " reasoning_content and in the content alike"
            )
        raise self._error(index, reason)

    def _error(self, index: int, reason: str) -> DataError:
        where = self._conversation
        return DataError(where.file, where.line, f"message {index} (assistant): {reason}")

    def _texts(
        self, messages: Sequence[Message], kept: Sequence[bool], inline: bool
    ) -> tuple[str, str]:
        """The prompt of the last message, and the rendering that includes it."""
        shown = [
            as_dict(message, keep, inline, self._delimiters)
            for message, keep in zip(messages, kept, strict=True)
        ]
        tools = self._conversation.tools
        return (
            self._template.render(shown[:-1], add_generation_prompt=True, tools=tools),
            self._template.render(shown, add_generation_prompt=False, tools=tools),
        )

    def _shows_own_thought(self, rendering: Rendering, whole: str) -> bool:
        message = rendering.thread[-1]
        thought = (message.thought or "").strip()
        if thought not in rendering.completion:
            return False
        if thought and thought not in message.content and not message.tool_calls:
            return True
        if not thought and _empty_thought(self._delimiters).search(rendering.completion):
            return True
        # The text could be the content's own: see whether the thought makes any difference.
        _, without = self._texts(rendering.thread, (*rendering.kept[:-1], False), rendering.inline)
        return whole != without

    def _check_history(self, rendering: Rendering) -> None:
        for message, keep in zip(rendering.thread[:-1], rendering.kept, strict=False):
            if keep and message.thought and message.thought.strip() not in rendering.prompt:
                _say_once(
                    ("strips", self._template.fingerprint, self._policy),
                    f"the chat template drops thoughts from the history that the policy"
                    f" {self._policy!r} keeps; the template is followed",
                )
                return

    def sample(
        self,
        thread: int,
        index: int,
        rendering: Rendering,
        prompt: np.ndarray,
        completion: np.ndarray,
    ) -> Sample:
        """Joins the ids of one turn. Raises DataError when prompt or completion is empty."""
        completion, trailing = self._to_end_of_turn(completion)
        if trailing:
            text = rendering.completion.removesuffix(trailing)
            rendering = dataclasses.replace(rendering, completion=text)
        if not len(prompt) or not len(completion):
            empty = "completion" if len(prompt) else "prompt"
            raise self._error(index, f"the template renders an empty {empty}")
        messages = self._threads[thread]
        return Sample(
            tokens=np.concatenate([prompt, completion]).astype(np.int32, copy=False),
            prompt_length=len(prompt),
            turn=_turn_of(messages, index),
            conversation=self._conversation,
            thread=thread,
            message=index,
            rendering=rendering,
        )

    def _to_end_of_turn(self, completion: np.ndarray) -> tuple[np.ndarray, str]:
        """The completion without what inference never generates, and the text of that."""
        ends = np.flatnonzero(np.isin(completion, self._tokenizer.stop_ids))
        if len(ends):
            rest = completion[ends[-1] + 1 :]
            trailing = self._tokenizer.decode(rest) if len(rest) else ""
            if not trailing.strip():
                return completion[: ends[-1] + 1], trailing
        _say_once(
            ("endless", self._template.fingerprint, self._tokenizer.fingerprint),
            "the chat template ends assistant turns with none of the tokenizer's stop tokens:"
            " completions are trained to their last token, and generation will not stop there",
        )
        return completion, ""


def _say_once(key: tuple[str, ...], text: str) -> None:
    if key not in _said:
        _said.add(key)
        logging.warning("%s", text)


def as_dict(
    message: Message, keep: bool, inline: bool, delimiters: tuple[str, str]
) -> dict[str, Any]:
    """A message as the template gets it; `inline` puts a kept thought into the content."""
    if not (inline and keep and message.thought is not None):
        return message.to_dict(with_thought=keep)
    shown = message.to_dict(with_thought=False)
    opening, closing = delimiters
    shown["content"] = f"{opening}\n{message.thought}\n{closing}\n\n{message.content}"
    return shown


def _empty_thought(delimiters: tuple[str, str]) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(delimiters[0])}\s*{re.escape(delimiters[1])}")


def _difference(prompt: str, whole: str) -> str:
    pairs = enumerate(zip(prompt, whole, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
    return (
        "the template's prompt is not a prefix of the rendered turn: at character"
        f" {at} the prompt has {prompt[at : at + 24]!r}, the turn {whole[at : at + 24]!r}"
    )


def _turn_of(thread: Sequence[Message], index: int) -> int:
    """How many trained messages of the thread come before `index`."""
    first = next((j for j, message in enumerate(thread) if message.role == "user"), len(thread))
    return sum(message.role == "assistant" for message in thread[first:index])


# Which characters are whose. Marks are placed around every content before the template renders it.


@dataclasses.dataclass(frozen=True)
class Span:
    """Characters [start, end) of prompt + completion that come from one part of a message."""

    start: int
    end: int
    role: str  # system, user, thought, response or tool; what no span covers is the template's
    turn: int  # the turn it belongs to, or leads to
    message: int


_MARK = 0xF0000  # Unicode plane 15, private use: two code points per marked part
_MARKS = re.compile("[\U000f0000-\U000ffffd]")


def spans(rendering: Rendering) -> list[Span]:
    """The parts of the messages in the text, in order and disjoint.

    Found by rendering once more with marks around every part. A template whose output depends on
    what a content begins or ends with can be upset by that; then parts are searched for in order,
    and one that cannot be found is left to the template.
    """
    parts: list[tuple[str, str, int]] = []  # text, role, message

    def mark(text: str, role: str, index: int) -> str:
        core = text.strip()  # templates trim: marks stay next to what survives
        if not core or len(parts) >= 32000:
            return text
        opening = chr(_MARK + 2 * len(parts))
        closing = chr(_MARK + 2 * len(parts) + 1)
        parts.append((core, role, index))
        return text.replace(core, f"{opening}{core}{closing}", 1)

    shown = []
    for index, (message, keep) in enumerate(zip(rendering.thread, rendering.kept, strict=True)):
        marked = dataclasses.replace(
            message,
            thought=mark(message.thought, "thought", index)
            if keep and message.thought
            else message.thought,
            content=mark(message.content, _role(message), index),
            tool_calls=tuple(
                _marked_call(call, lambda text, i=index: mark(text, "response", i))
                for call in message.tool_calls
            ),
        )
        shown.append(as_dict(marked, keep, rendering.inline, rendering.delimiters))
    text = rendering.prompt + rendering.completion
    try:
        whole = rendering.template.render(shown, add_generation_prompt=False, tools=rendering.tools)
    except UserError:
        whole = ""
    found = _marked_ranges(whole, text)
    if found is None:
        found = _searched_ranges([core for core, _, _ in parts], text)
    turns = [_turn_of(rendering.thread, index) for index in range(len(rendering.thread))]
    return [
        Span(start, end, parts[number][1], turns[parts[number][2]], parts[number][2])
        for start, end, number in found
    ]


def _role(message: Message) -> str:
    return "response" if message.role == "assistant" else message.role


def _marked_call(value: Any, mark: Any) -> Any:
    """A tool call with its function's name and every string among its arguments marked."""

    def leaves(value: Any) -> Any:
        if isinstance(value, str):
            return mark(value)
        if isinstance(value, dict):
            return {key: leaves(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [leaves(part) for part in value]
        return value

    if not isinstance(value, dict):
        return value
    inner = value.get("function", value)
    if not isinstance(inner, dict):
        return value
    marked = {k: leaves(v) if k in ("name", "arguments") else v for k, v in inner.items()}
    return {**value, "function": marked} if "function" in value else marked


def _marked_ranges(whole: str, text: str) -> list[tuple[int, int, int]] | None:
    """(start, end, part) in `text`; None when the marks changed more than themselves."""
    starts: dict[int, int] = {}
    ranges = []
    for removed, match in enumerate(_MARKS.finditer(whole)):
        part, closing = divmod(ord(match[0]) - _MARK, 2)
        at = match.start() - removed
        if not closing:
            starts[part] = at
        elif part in starts:
            ranges.append((starts.pop(part), at, part))
    plain = _MARKS.sub("", whole)
    if starts or not plain.startswith(text):
        return None
    ranges = sorted((start, min(end, len(text)), part) for start, end, part in ranges)
    inside = [r for r in ranges if r[0] < r[1]]
    return list(_disjoint(inside))


def _disjoint(ranges: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    end = 0
    for found in ranges:
        if found[0] >= end:
            end = found[1]
            yield found


def _searched_ranges(parts: Sequence[str], text: str) -> list[tuple[int, int, int]]:
    ranges, cursor = [], 0
    for number, part in enumerate(parts):
        start = text.find(part, cursor)
        if start >= 0:
            cursor = start + len(part)
            ranges.append((start, cursor, number))
    return ranges


def token_spans(sample: Sample) -> list[Span | None]:
    """Per token of the sample, the span that its first character lies in; None: the template's.

    Raises:
      ValueError: the sample has no rendering.
    """
    rendering = sample.rendering
    if rendering is None:
        raise ValueError("a sample made of tokens alone has no roles")
    encode = rendering.tokenizer.encode_with_offsets
    starts = np.concatenate(
        [
            encode(rendering.prompt)[1][:, 0],
            len(rendering.prompt) + encode(rendering.completion)[1][:, 0],
        ]
    )[sample.skipped :]
    found = spans(rendering)
    bounds = np.array([span.start for span in found], np.int64)
    out: list[Span | None] = []
    for start, at in zip(starts, np.searchsorted(bounds, starts, side="right") - 1, strict=True):
        span = found[at] if at >= 0 else None
        out.append(span if span is not None and start < span.end else None)
    return out


def response_start(sample: Sample) -> int | None:
    """Index of the first response token: after the thought, its delimiter and the space behind it.

    None: unknown, for samples made of tokens alone.
    """
    if sample.thought_length is not None:
        return sample.prompt_length + sample.thought_length
    rendering = sample.rendering
    if rendering is None:
        return None
    own = len(rendering.thread) - 1
    if rendering.thread[own].thought is None:
        return sample.prompt_length
    opening, closing = map(re.escape, rendering.delimiters)
    text = rendering.prompt + rendering.completion
    mine = [span for span in spans(rendering) if span.message == own]
    start = max(
        (span.end for span in mine if span.role == "thought"), default=len(rendering.prompt)
    )
    end = re.compile(rf"(?:{opening})?\s*{closing}\s*").match(text, start)
    if end:
        start = end.end()
    else:  # delimiters of the template's own
        start = next((span.start for span in mine if span.role == "response"), start)
    offsets = rendering.tokenizer.encode_with_offsets(rendering.completion)[1]
    inside = int(np.searchsorted(offsets[:, 0], start - len(rendering.prompt)))
    # Counted from the end, which a sample cut from the left still has.
    return max(len(sample.tokens) - len(offsets) + inside, sample.prompt_length)
