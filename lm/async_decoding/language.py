# SPDX-License-Identifier: Apache-2.0
"""The language in which an answer promises parts of itself: flat fork and join.

    response := item* EOS                     item := text | promise | sync
    promise  := <promise topic="..." tokens="N"/>      stands where its part will stand
    thread   := <async topic="..."> text </async>      one per promise
    sync     := <sync/>                                main waits for every open thread

The seven pieces of `TAGS` are vocabulary items; the topic and the digits between them are ordinary
tokens, and so are tags that a user types into a prompt (`encode_prompt`). What closes or divides a
tag (`" tokens="`, `"/>`, `">`) is plain text anywhere else, so that HTML stays legal.

As one text, a program is its main thread with the blocks of each group, in the order of their
promises, in front of the `<sync/>` that waits for them, or at the end: the order of the training
layout. The parser also takes a block right behind its promise.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lm.text import vocabulary
from lm.text.tokenizers import Tokenizer

PROMISE, TOKENS, PROMISE_END = '<promise topic="', '" tokens="', '"/>'
ASYNC, ASYNC_BODY, ASYNC_END = '<async topic="', '">', "</async>"
SYNC = "<sync/>"
TAGS = (PROMISE, TOKENS, PROMISE_END, ASYNC, ASYNC_BODY, ASYNC_END, SYNC)
RESERVED = (PROMISE, ASYNC, ASYNC_END, SYNC)  # what no text may contain
STEP = 10  # promised lengths are multiples of it
MAX_TOKENS = 1000  # the longest promise
CAP = 2  # a block is cut off at so many times its promise

TEXT, END = "text", "end of answer"  # kinds of pieces beside the tags
_TAG = vocabulary.any_of(TAGS)
_RESERVED = vocabulary.any_of(RESERVED)
_NUMBER = re.compile(r"[0-9]+")


class LanguageError(ValueError):
    """Text or tokens that are no program: where, and why.

    position: a character of the text, a token of a thread, or an item of a program.
    thread: of token ids: 0 is main, k the block of the k-th promise; else None.
    """

    def __init__(self, position: int, reason: str, thread: int | None = None):
        where = "" if thread is None else " of main" if not thread else f" of block {thread}"
        super().__init__(f"at {position}{where}: {reason}")
        self.position, self.reason, self.thread = position, reason, thread


@dataclasses.dataclass(frozen=True)
class Text:
    """What the main thread says."""

    text: str


@dataclasses.dataclass(frozen=True)
class Promise:
    """A part that another thread writes: about what, and how many tokens it will take."""

    topic: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class Sync:
    """Main waits for every open thread; what follows may depend on them."""


Item = Text | Promise | Sync


@dataclasses.dataclass(frozen=True)
class Program:
    """An answer: the main thread's items, and the text of each promise's block, in order."""

    items: tuple[Item, ...]
    threads: tuple[str, ...] = ()

    @property
    def promises(self) -> tuple[Promise, ...]:
        return tuple(item for item in self.items if isinstance(item, Promise))


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tag, the end of the answer, or a run of text between them."""

    kind: str  # one of TAGS, TEXT or END
    text: str
    position: int


# --- texts


def promise_text(promise: Promise) -> str:
    """The tag that the main thread writes."""
    return f"{PROMISE}{promise.topic}{TOKENS}{promise.tokens}{PROMISE_END}"


def block_text(topic: str, text: str) -> str:
    """A whole block, opening and end included."""
    return f"{ASYNC}{topic}{ASYNC_BODY}{text}{ASYNC_END}"


def to_text(program: Program) -> str:
    """The program as one text, which `parse` turns back into it."""
    threads = iter(program.threads)
    out: list[str] = []
    blocks: list[str] = []
    for item in program.items:
        if isinstance(item, Text):
            out.append(item.text)
        elif isinstance(item, Promise):
            out.append(promise_text(item))
            blocks.append(block_text(item.topic, next(threads)))
        else:
            out += [*blocks, SYNC]
            blocks = []
    return "".join([*out, *blocks])


def render(program: Program) -> str:
    """The answer as a reader sees it: each part at its promise, no tags."""
    threads = iter(program.threads)
    return "".join(
        item.text if isinstance(item, Text) else next(threads)
        for item in program.items
        if not isinstance(item, Sync)
    )


def plain(text: str) -> Program:
    """The program that promises nothing."""
    return Program((Text(text),) if text else ())


# --- pieces


def pieces_of_text(text: str) -> list[Piece]:
    """Tags and the runs between them; a piece's position is its first character."""
    out, position = [], 0
    for index, part in enumerate(_TAG.split(text)):
        if part:
            out.append(Piece(part if index % 2 else TEXT, part, position))
        position += len(part)
    return out


def pieces_of_ids(
    ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer, stop_ids: Sequence[int]
) -> list[Piece]:
    """Tags, ends and the decoded runs between them; a piece's position is its first token."""
    kinds = dict.fromkeys(map(int, stop_ids), END) | {i: t for t, i in tag_ids(tokenizer).items()}
    values = vocabulary.id_list(ids)
    out, position = [], 0
    for kind, run in itertools.groupby(values, lambda i: kinds.get(i, TEXT)):
        found = list(run)
        if kind == TEXT:
            out.append(Piece(TEXT, tokenizer.decode(found), position))
        else:
            text = "" if kind == END else kind
            out += [Piece(kind, text, position + n) for n in range(len(found))]
        position += len(found)
    return out


def tag_ids(tokenizer: Tokenizer) -> Mapping[str, int]:
    """Tag -> id. Raises ValueError when the tokenizer lacks one: add `TAGS` to it."""
    found = {tag: tokenizer.token_id(tag) for tag in TAGS}
    missing = [tag for tag, token in found.items() if token is None]
    if missing:
        raise ValueError(f"tokenizer {tokenizer.name} lacks the tags {', '.join(missing)}")
    return found


def encode_prompt(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids [n] int32 of a prompt, in which a tag is text and steers nothing."""
    return encode_texts([text], tokenizer)[0]


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids [n] int32 of each text, in which tags are text."""
    runs, ends = [], []
    for text in texts:
        at = 0
        while found := _TAG.search(text, at):  # cut behind the first character, and nothing is one
            runs.append(text[at : found.start() + 1])
            at = found.start() + 1
        runs.append(text[at:])
        ends.append(len(runs))
    ids = tokenizer.encode_batch(runs)
    return [
        np.concatenate(ids[begin:end]).astype(np.int32)
        for begin, end in itertools.pairwise([0, *ends])
    ]


# --- the strict parser


class _Reader:
    """Walks over pieces."""

    def __init__(self, pieces: Sequence[Piece], end: int, thread: int | None = None):
        self.pieces, self.end, self.thread, self.at = pieces, end, thread, 0

    def peek(self) -> Piece | None:
        return self.pieces[self.at] if self.at < len(self.pieces) else None

    def take(self) -> Piece:
        self.at += 1
        return self.pieces[self.at - 1]

    def error(self, piece: Piece | None, reason: str) -> LanguageError:
        position = self.end if piece is None else piece.position
        return LanguageError(position, reason, self.thread)

    def expect(self, kind: str, where: str) -> None:
        piece = self.peek()
        if piece is None or piece.kind != kind:
            raise self.error(piece, f"{where} is not closed by {kind!r}")
        self.take()

    def topic(self, where: str) -> str:
        piece = self.peek()
        if piece is None or piece.kind != TEXT:
            raise self.error(piece, f"{where} without a topic")
        reason = topic_problem(piece.text)
        if reason:
            raise self.error(piece, reason)
        return self.take().text

    def promise(self) -> Promise:
        self.take()
        topic = self.topic("a promise")
        self.expect(TOKENS, "the topic of a promise")
        piece = self.peek()
        if piece is None or piece.kind != TEXT or not _NUMBER.fullmatch(piece.text):
            raise self.error(piece, "the number of tokens of a promise is not a number")
        tokens = int(piece.text[:9])
        if str(tokens) != piece.text or not tokens or tokens % STEP:
            shown = piece.text if len(piece.text) < 20 else f"{piece.text[:17]}..."
            raise self.error(piece, f"tokens={shown} of a promise is not a multiple of {STEP}")
        self.take()
        self.expect(PROMISE_END, "a promise")
        return Promise(topic, tokens)

    def block(self) -> tuple[str, str]:
        """(topic, text) of a whole block."""
        self.take()
        topic = self.topic("a block")
        self.expect(ASYNC_BODY, "the opening of a block")
        text = []
        while (piece := self.peek()) is not None and piece.kind != ASYNC_END:
            if piece.kind in (*RESERVED, END):
                raise self.error(piece, f"{piece.text or piece.kind} inside the block of {topic!r}")
            text.append(self.take().text)
        self.expect(ASYNC_END, f"the block of {topic!r}")
        return topic, "".join(text)


class _Builder:
    """Puts the items of a main thread together."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.threads: list[str | None] = []
        self.topics: list[str] = []
        self.text: list[str] = []

    def flush(self, item: Item | None = None) -> None:
        if any(self.text):
            self.items.append(Text("".join(self.text)))
        self.text = []
        if item is not None:
            self.items.append(item)

    def promise(self, promise: Promise) -> None:
        self.flush(promise)
        self.threads.append(None)
        self.topics.append(promise.topic)

    @property
    def pending(self) -> int | None:
        """The first promise without a block."""
        return self.threads.index(None) if None in self.threads else None

    def program(self) -> Program:
        self.flush()
        return Program(tuple(self.items), tuple(self.threads))


def parse(text: str) -> Program:
    """Reads a program from its text. Raises LanguageError with the character and the reason."""
    reader, builder = _Reader(pieces_of_text(text), len(text)), _Builder()
    while (piece := reader.peek()) is not None:
        if piece.kind == PROMISE:
            builder.promise(reader.promise())
        elif piece.kind == ASYNC:
            topic, body = reader.block()
            pending = builder.pending
            if pending is None:
                raise reader.error(piece, f"the block of {topic!r} was not promised")
            if builder.topics[pending] != topic:
                expected = builder.topics[pending]
                raise reader.error(piece, f"the block of {topic!r} where {expected!r} comes next")
            builder.threads[pending] = body
        elif piece.kind == SYNC:
            _refuse_pending(reader, builder, piece)
            builder.flush(Sync())
            reader.take()
        elif piece.kind == ASYNC_END:
            raise reader.error(piece, f"{ASYNC_END} outside of a block")
        else:
            builder.text.append(reader.take().text)
    _refuse_pending(reader, builder, None)
    return builder.program()


def _refuse_pending(reader: _Reader, builder: _Builder, piece: Piece | None) -> None:
    if builder.pending is not None:
        topic = builder.topics[builder.pending]
        raise reader.error(piece, f"the promise of {topic!r} has no block")


def parse_ids(
    main: Sequence[int] | np.ndarray,
    threads: Sequence[Sequence[int] | np.ndarray],
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
) -> Program:
    """Reads a program from what a decoder wrote.

    Args:
      main: token ids of the main thread up to its end token, which must be there.
      threads: of the k-th promise, the ids of its block from the opening to `</async>`.

    Raises:
      LanguageError: with the thread, the token in it, and the reason.
    """
    reader = _Reader(pieces_of_ids(main, tokenizer, stop_ids), len(main), thread=0)
    builder = _Builder()
    while (piece := reader.peek()) is not None and piece.kind != END:
        if piece.kind == PROMISE:
            builder.promise(reader.promise())
        elif piece.kind == SYNC:
            builder.flush(Sync())
            reader.take()
        elif piece.kind in (ASYNC, ASYNC_END):
            raise reader.error(piece, f"{piece.kind} in the main thread")
        else:
            builder.text.append(reader.take().text)
    if piece is None:
        raise reader.error(None, "the answer has no end")
    if reader.take() and reader.peek() is not None:
        raise reader.error(reader.peek(), "the answer goes on after its end")
    if len(threads) != len(builder.threads):
        reason = f"{len(builder.threads)} promises and {len(threads)} blocks"
        raise reader.error(None, reason)
    for index, ids in enumerate(threads):
        pieces = pieces_of_ids(ids, tokenizer, stop_ids)
        inner = _Reader(pieces, len(ids), thread=index + 1)
        if inner.peek() is None or inner.peek().kind != ASYNC:
            raise inner.error(inner.peek(), "a block does not begin with its opening")
        topic, builder.threads[index] = inner.block()
        if topic != builder.topics[index]:
            raise inner.error(pieces[0], f"{topic!r} was promised as {builder.topics[index]!r}")
        if inner.peek() is not None:
            raise inner.error(inner.peek(), "a block goes on after its end")
    return builder.program()


# --- the validator


def topic_problem(topic: str) -> str:
    """Why a text cannot be a topic, "" when it can."""
    if not topic or topic != topic.strip():
        return f"the topic {topic!r} is empty or has space around it"
    if '"' in topic or "\n" in topic:
        return f"the topic {topic!r} has a quote or a line break"
    if _TAG.search(topic):
        return f"the topic {topic!r} has a tag in it"
    return ""


def validate(program: Program) -> Program:
    """The program itself, if it may be trained on.

    Every token lies in one thread: nothing is nested and nothing overlaps, since texts hold no
    tags, each promise has one block that says something, and each sync waits for something.

    Raises:
      LanguageError: with the item (or of which item the block) and the reason.
    """
    if len(program.promises) != len(program.threads):
        reason = f"{len(program.promises)} promises and {len(program.threads)} blocks"
        raise LanguageError(len(program.items), reason)
    threads = iter(program.threads)
    previous: Item | None = None
    waiting = False  # for a block
    for position, item in enumerate(program.items):
        for reason in _problems(item, previous, waiting, threads):
            raise LanguageError(position, reason)
        waiting = isinstance(item, Promise) or (waiting and not isinstance(item, Sync))
        previous = item
    return program


def _problems(
    item: Item, previous: Item | None, waiting: bool, threads: Iterator[str]
) -> Iterator[str]:
    if isinstance(item, Sync):
        if not waiting:
            yield f"{SYNC} waits for nothing"
        return
    text = next(threads) if isinstance(item, Promise) else item.text
    if isinstance(item, Promise):
        if reason := topic_problem(item.topic):
            yield reason
        if item.tokens % STEP or not STEP <= item.tokens <= MAX_TOKENS:
            yield f"tokens={item.tokens} is not a multiple of {STEP} up to {MAX_TOKENS}"
    elif isinstance(previous, Text):
        yield "two texts in a row"
    what = f"the block of {item.topic!r}" if isinstance(item, Promise) else "a text"
    if not text:
        yield f"{what} is empty"
    if found := _RESERVED.search(text):
        yield f"{what} holds the tag {found[0]!r}"


def reserve(length: int) -> int:
    """The promise for a block of so many tokens: the next multiple of `STEP`."""
    return max(STEP, -(-length // STEP) * STEP)


def clamp(tokens: int) -> int:
    """The legal promise closest to one of any size, upwards."""
    return min(reserve(min(tokens, MAX_TOKENS)), MAX_TOKENS)


def recounted(program: Program, tokenizer: Tokenizer) -> Program:
    """The program with promises of what its blocks really take, rounded up, or of the most that can
    be promised."""
    lengths = iter([len(ids) for ids in tokenizer.encode_batch(list(program.threads))])
    items = tuple(
        dataclasses.replace(item, tokens=clamp(next(lengths)))
        if isinstance(item, Promise)
        else item
        for item in program.items
    )
    return dataclasses.replace(program, items=items)
