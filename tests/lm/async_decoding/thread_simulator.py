# SPDX-License-Identifier: Apache-2.0
"""The rules of threaded decoding again, with lists and sets: one request, one token after another.

Nothing is shared with the decoder but `assembly.complete_promise`, which says what a promise is,
and `language.clamp`.
"""

import dataclasses

from lm.async_decoding import assembly, language


@dataclasses.dataclass
class Block:
    """A promise and what became of it."""

    topic: list[int]
    opening: list[int]
    most: int  # tokens of text
    position: int  # of its first token
    memory: set[int]  # entries of the pool; the promise's last token joins when it is fed
    ids: list[int] = dataclasses.field(default_factory=list)
    steps: list[int] = dataclasses.field(default_factory=list)
    fed: int = 0
    closed: bool = False  # nothing more comes out
    gone: bool = False  # its end has been fed
    entries: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Fed:
    """A token that was fed."""

    thread: int
    token: int
    position: int
    sees: frozenset[int]


class Simulator:
    """Decodes what `script(thread, index)` says comes out of a thread."""

    def __init__(
        self, tokenizer, script, *, prompt, places, max_tokens, scheme, form="async", watch=False
    ):
        """prompt: tokens of it; places: blocks at a time; watch: keep what each entry sees."""
        self.form = form
        self.watch = watch
        self.tokenizer, self.script, self.scheme = tokenizer, script, scheme
        self.tags = language.tag_ids(tokenizer)
        self.stops = tokenizer.stop_ids
        self.places, self.max_tokens = places, max_tokens
        self.pool: list[Fed] = [Fed(0, -1, i, frozenset()) for i in range(prompt)]
        self.memory = set(range(prompt))
        self.main: list[int] = []
        self.main_steps: list[int] = []
        self.position = prompt - 1  # of main's last token that came out
        self.jump = 0
        self.blocks: list[Block] = []
        self.row_of: dict[int, Block] = {}
        self.unjoined: list[Block] = []
        self.waiting = self.ended = self.over = False
        self.decoded = self.step = 0

    def run(self, most=10_000):
        while not self.done:
            assert self.step < most
            self.one()
        return self

    @property
    def done(self):
        return self.over or (self.ended and all(block.closed for block in self.blocks))

    def one(self):
        """One step."""
        main_speaks = self.step == 0 or not self.waiting
        main_speaks &= not self.ended
        if self.step:
            self.feed(main_speaks)
        self.step += 1
        speakers = []
        for row in sorted(self.row_of):
            block = self.row_of[row]
            if not block.closed and block.fed >= len(block.opening):
                speakers.append(block)
        gone = [row for row, block in self.row_of.items() if block.gone]
        if main_speaks:
            self.main_speaks()
        for block in speakers:
            self.block_speaks(block)
        if self.waiting and all(block.closed for block in self.blocks):
            self.join()
        for row in gone:
            del self.row_of[row]
        if not self.done:
            started = [b for b in self.blocks if b in self.row_of.values() or b.gone]
            waiting = [b for b in self.blocks if b not in started]
            for row in range(1, self.places + 1):
                if row not in self.row_of and waiting:
                    self.row_of[row] = waiting.pop(0)
        self.started = [b for b in self.blocks if b in self.row_of.values() or b.gone]

    def feed(self, main_speaks):
        """Everybody's entry is in the pool before anybody reads."""
        fed = []
        if main_speaks:
            fed.append((None, 0, self.main[-1], self.position))
        for row in sorted(self.row_of):
            block = self.row_of[row]
            opening = block.opening
            number = block.fed - len(opening)
            if number < 0:
                token = opening[block.fed]
            elif block.closed:
                token = self.tags[language.ASYNC_END]
            else:
                token = block.ids[number]
            thread = self.blocks.index(block) + 1
            fed.append((block, thread, token, block.position + block.fed))
        first = len(self.pool)
        for offset, (block, *_) in enumerate(fed):
            entry = first + offset
            if block is None:
                self.memory.add(entry)
                for other in self.blocks:
                    if other.fed == 0 and other.promise == len(self.main) - 1:
                        other.memory.add(entry)
            else:
                block.memory.add(entry)
                block.entries.append(entry)
        for block, thread, token, position in fed:
            if block is None and token == self.tags[language.SYNC] and self.form == "async":
                for other in self.unjoined:
                    self.memory |= set(other.entries)
                self.unjoined = []
            memory = self.memory if block is None else block.memory
            sees = frozenset(memory) if self.watch else frozenset()
            self.pool.append(Fed(thread, token, position, sees))
            if block is not None:
                block.fed += 1
                block.gone = block.closed

    def comes_out(self):
        """Whether there is room for one more token."""
        if self.decoded == self.max_tokens:
            self.over = True
            return False
        self.decoded += 1
        self.over = self.decoded == self.max_tokens
        return True

    def main_speaks(self):
        token = self.script(0, len(self.main))
        if not self.comes_out():
            return
        self.main.append(token)
        self.main_steps.append(self.step)
        self.position += 1 + self.jump
        self.jump = 0
        if token in self.stops:
            self.ended = True
        elif token == self.tags[language.SYNC]:
            self.waiting = self.form == "async"
        elif token == self.tags[language.PROMISE_END]:
            if self.form == "apar":
                self.promise([], [self.tags[language.ASYNC_BODY]], 10**9)
            else:
                self.maybe_promise()

    def maybe_promise(self):
        start = max(
            (i for i, t in enumerate(self.main) if t == self.tags[language.PROMISE]), default=None
        )
        if start is None:
            return
        pieces = language.pieces_of_ids(self.main[start:], self.tokenizer, self.stops)
        found = assembly.complete_promise(pieces, 0)
        if found is None or found[2] != len(pieces):
            return
        divide = self.main.index(self.tags[language.TOKENS], start)
        topic, tokens = self.main[start + 1 : divide], language.clamp(found[1])
        opening = [self.tags[language.ASYNC], *topic, self.tags[language.ASYNC_BODY]]
        self.promise(topic, opening, 2 * tokens)
        if self.scheme == "predicted":
            self.jump = len(topic) + 2 + tokens + 1

    def promise(self, topic, opening, most):
        block = Block(topic, opening, most, self.position + 1, set(self.memory))
        block.promise = len(self.main) - 1
        self.blocks.append(block)
        self.unjoined.append(block)

    def block_speaks(self, block):
        token = self.script(self.blocks.index(block) + 1, len(block.ids))
        full = len(block.ids) == block.most
        if full and token != self.tags[language.ASYNC_END]:
            block.closed = True  # cut off
            return
        if not self.comes_out():
            return
        block.ids.append(token)
        block.steps.append(self.step)
        block.closed = token == self.tags[language.ASYNC_END] or token in self.stops

    def join(self):
        self.waiting = False
        lengths = [len(block.opening) + self.said(block) + 1 for block in self.unjoined]
        if self.scheme == "fork_join_sum":
            self.position += sum(lengths)
        elif self.scheme == "fork_join_max":
            ends = [b.position + n - 1 for b, n in zip(self.unjoined, lengths, strict=True)]
            self.position = max([self.position, *(end + 1 for end in ends)])

    def said(self, block):
        """Tokens of a block's text, its end not counted."""
        last = block.ids[-1:]
        ended = last and (last[0] == self.tags[language.ASYNC_END] or last[0] in self.stops)
        return len(block.ids) - bool(ended)
