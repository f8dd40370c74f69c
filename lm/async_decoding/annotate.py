# SPDX-License-Identifier: Apache-2.0
"""Plain answers as programs: who says which parts can be written at once.

An annotator takes the conversation so far and an answer and returns the answer's program; the
`rules` annotator reads only the answer. Whatever it returns goes through the validator and must
read exactly as the answer did; what fails is kept as it was, with the reason counted.

Rules. A unit is an item of a list, the body of a section under a heading, or a sentence of a
paragraph. Units that follow each other and do not lean on each other form a group: all but the last
are promised, the last is written by main meanwhile. A unit leans on others when it points back
(begins with `this` or `it`, says `step 2`, `therefore` ...) or shares a word with one of them that
neither the prompt nor the text before the group has brought up. A sync follows a group when
anything follows it.
"""

import collections
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from lm.async_decoding import language
from lm.async_decoding.language import Item, LanguageError, Program, Promise, Sync, Text
from lm.config import require_at_least_zero
from lm.data import conversations
from lm.data.conversations import Conversation, Message
from lm.text.tokenizers import Tokenizer

# (messages before the answer, the answer) -> its program; LanguageError when it has none
Annotator = Callable[[Sequence[Message], str], Program]

_LIST = re.compile(r"[ \t]*(?:[-*•+]|\(?\d+[.):]|\(?[A-Za-z][.)])[ \t]+(?=\S)")
_HEADING = re.compile(r"#{1,6}[ \t]+\S")
_SENTENCE = re.compile(r"(?s).+?(?:[.!?:]+[\"')\]]*(?:\s+|\Z)|\Z)")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?|\d+")
# Pronouns point back where a unit begins; further on they mostly mean something of its own.
_BACK_FIRST = re.compile(
    r"(?:\W*+\w++){0,2}?\W*+(?:this|that|these|those|it|its|they|them|their|he|she|his|her|both|so|"
    r"such|then|next|overall|finally|however|instead|otherwise|also|another|others?)\b",
    re.IGNORECASE,
)
_BACK = re.compile(
    r"\b(?:former|latter|above|previous(?:ly)?|earlier|aforementioned|therefore|thus|hence|"
    r"consequently|accordingly|altogether|conclusion|summary|"
    r"(?:step|item|point|part|section)\s+\d+)\b",
    re.IGNORECASE,
)
_COMMON = (
    "a an and are as at be been but by can do does for from had has have if in into is may more "
    "most no not of on only or out over some than the there to under up very was were what when "
    "where which while who will with would you your we our us i me my"
)
_FREQUENT = frozenset(_COMMON.split())


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """gain: a unit is promised when it takes at least so many times the tokens of its promise.
    topic_words: at most so many words of a unit are its topic."""

    gain: float = 1.5
    topic_words: int = 3

    def __post_init__(self) -> None:
        require_at_least_zero("--gain", self.gain)


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rule-based annotator, with a tokenizer to count with."""

    tokenizer: Tokenizer
    config: RuleConfig = RuleConfig()

    def __call__(self, history: Sequence[Message], answer: str) -> Program:
        before = _words("\n".join(message.content for message in history))
        items: list[Item] = []
        threads: list[str] = []
        units = list(units_of(answer))
        at = 0
        while at < len(units):
            group = self._group(units[at:], before)
            promised = [unit for unit in group[:-1] if unit.free]
            _add(items, group, threads, self._promise)
            before |= set(itertools.chain.from_iterable(_words(unit.text) for unit in group))
            at += len(group)
            if promised and at < len(units):
                items.append(Sync())
        return Program(tuple(items), tuple(threads))

    def _group(self, units: Sequence["Unit"], before: set[str]) -> list["Unit"]:
        """The longest run of units that do not lean on each other, with what binds them; at least
        one unit, and one alone when nothing can be promised."""
        group: list[Unit] = []
        said: set[str] = set()  # by parts of this group
        for unit in units:
            words = _words(unit.text)
            if unit.free:
                if words & said or _points_back(unit.text) or not self._worth_it(unit):
                    break
                said |= words - before
            elif unit.glue and group:
                before = before | words  # a heading is main's: parts behind it may see it
            else:
                break
            group.append(unit)
        while group and not group[-1].free:
            group.pop()
        if sum(unit.free for unit in group) < 2:
            return list(units[:1])
        return group

    def _worth_it(self, unit: "Unit") -> bool:
        promise = self._promise(unit.text)
        topic, number = self.tokenizer.encode_batch([promise.topic, str(promise.tokens)])
        cost = 3 + len(topic) + len(number)  # of the tag's own tokens
        return len(self.tokenizer.encode(unit.text)) >= self.config.gain * cost

    def _promise(self, text: str) -> Promise:
        found = _WORD.findall(_LIST.sub("", text, count=1))
        words = [word for word in found if word.lower() not in _FREQUENT]
        topic = " ".join((words or ["part"])[: self.config.topic_words])
        length = len(self.tokenizer.encode(text))
        return Promise(topic, language.clamp(length))


ANNOTATORS: dict[str, Callable[[Tokenizer, RuleConfig], Annotator]] = {"rules": Rules}


def _add(
    items: list[Item],
    group: Sequence["Unit"],
    threads: list[str],
    promise: Callable[[str], Promise],
) -> None:
    """Appends a group: promises, and main's own text in one piece where it can be."""
    for unit in group:
        if unit.free and unit is not group[-1]:
            items.append(promise(unit.text))
            threads.append(unit.text)
        elif items and isinstance(items[-1], Text):
            items[-1] = Text(items[-1].text + unit.text)
        else:
            items.append(Text(unit.text))


@dataclasses.dataclass(frozen=True)
class Unit:
    """A stretch of an answer. free: it may be promised; glue: it stands between such units (a
    heading) and binds nothing."""

    text: str
    free: bool
    glue: bool = False


def units_of(answer: str) -> Iterator[Unit]:
    """Cuts an answer into units; together they are the answer, to the last character."""
    lines = answer.splitlines(keepends=True)
    kinds = ["heading" if _HEADING.match(x) else "item" if _LIST.match(x) else "" for x in lines]
    indents = [len(x) - len(x.lstrip()) for x in lines]
    under_heading = False
    at = 0
    while at < len(lines):
        end = at + 1
        if kinds[at] == "heading":
            yield Unit(lines[at], free=False, glue=True)
            under_heading = True
        elif under_heading:  # a section's body goes with its heading, lists and all
            while end < len(lines) and kinds[end] != "heading":
                end += 1
            yield Unit("".join(lines[at:end]), free=bool("".join(lines[at:end]).strip()))
            under_heading = False
        elif kinds[at] == "item":
            # deeper items, continuation lines and blank lines belong to the item
            while end < len(lines) and (
                not lines[end].strip()
                or indents[end] > indents[at]
                or not (kinds[end] or _ends(lines[end - 1]))
            ):
                end += 1
            yield Unit("".join(lines[at:end]), free=True)
        else:
            while end < len(lines) and not kinds[end]:
                end += 1
            for sentence in _SENTENCE.findall("".join(lines[at:end])):
                # what ends in a colon leads to what comes after it
                yield Unit(sentence, free=not sentence.rstrip().endswith(":"))
        at = end


def _ends(line: str) -> bool:
    """Whether a line closes a paragraph: what comes after it is no continuation."""
    return not line.strip() or line.rstrip().endswith((".", "!", "?", ":"))


def _points_back(text: str) -> bool:
    return bool(_BACK_FIRST.match(_LIST.sub("", text, count=1)) or _BACK.search(text))


def _words(text: str) -> set[str]:
    """What a text brings up: its words in lower case, the commonest left out."""
    return {word.lower() for word in _WORD.findall(text)} - _FREQUENT


# --- files


@dataclasses.dataclass
class Report:
    """What became of a file's answers."""

    conversations: int = 0
    answers: int = 0
    annotated: int = 0  # with a promise
    sequential: int = 0  # nothing to promise
    dropped: int = 0  # conversations: a refused answer holds a tag, which training would obey
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    promises: int = 0


def checked(annotator: Annotator, history: Sequence[Message], answer: str) -> Program:
    """An annotator's program, valid and with the answer's own words.

    Raises LanguageError: the program is not valid, or does not read as the answer.
    """
    program = language.validate(annotator(history, answer))
    rendered = language.render(program)
    if rendered != answer:
        pairs = enumerate(zip(rendered, answer, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(rendered), len(answer)))
        raise LanguageError(at, "the program does not read as the answer")
    return program


def answers_in(conversation: Conversation) -> list[int]:
    """Which messages are annotated: an assistant's greeting is context, and a call or a thought is
    not the answer's text."""
    return [
        index
        for index, message in enumerate(conversation.messages)
        if message.role == "assistant" and index and message.content
    ]


def annotate(
    conversation: Conversation, annotator: Annotator, report: Report
) -> Conversation | None:
    """A conversation with its assistants' answers as programs; an answer that is refused stays as
    it is, and one that holds a tag already takes the conversation out (None)."""
    messages: list[Message] = []
    report.conversations += 1
    answers = answers_in(conversation)
    for index, message in enumerate(conversation.messages):
        if index not in answers:
            messages.append(message)
            continue
        report.answers += 1
        try:
            program = checked(annotator, conversation.messages[:index], message.content)
        except LanguageError as error:
            report.refused[error.reason] += 1
            if any(tag in message.content for tag in language.RESERVED):
                report.dropped += 1
                return None
            program = language.plain(message.content)
        report.promises += len(program.threads)
        report.annotated += bool(program.threads)
        report.sequential += not program.threads
        messages.append(dataclasses.replace(message, content=language.to_text(program)))
    return dataclasses.replace(conversation, messages=tuple(messages))


def write(
    given: Iterable[Conversation], annotator: Annotator, path: str | os.PathLike[str]
) -> Report:
    """Annotates conversations into a JSONL file, whole or not at all."""
    report = Report()
    made = (annotate(one, annotator, report) for one in given)
    conversations.write_conversations(path, (one for one in made if one is not None))
    return report
