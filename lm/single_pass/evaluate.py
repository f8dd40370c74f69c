# SPDX-License-Identifier: Apache-2.0
"""Multi-turn generation on held-out conversations, and their teacher-forced loss, by depth.

Every conversation is answered message by message, all of them in one batch. The history that the
model sees holds its own earlier responses, its own thoughts dropped or kept by the same policy
that training followed; user messages and tool results are the reference's. Only main threads are
generated; the loss is over all threads.

The depth of a message is the number of the user's turn that it answers, from 1. In a tool loop the
reference's result follows the model's own call, and the last message of the turn is scored.
"""

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lm import generate, losses, train
from lm.config import DataConfig
from lm.data import arithmetic, gsm8k, packing
from lm.data.conversations import Conversation, Message
from lm.data.layout import Layout
from lm.errors import DataError, UserError
from lm.progress import Progress
from lm.setup import Setup
from lm.sharding import Sharding
from lm.single_pass import layouts, pipeline, samples
from lm.transformer import Params

_LOSS_TOKENS = 32768  # of a teacher-forced batch, padding included


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


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one model did on one set of conversations."""

    rows: list[dict[str, Any]]  # depth, exact_match, loss, n (scored answers), unclosed thoughts
    exact_match: float  # over all scored answers; NaN without any
    loss: float  # nats per trained token, over all depths
    n: int
    transcripts: list[Transcript]
    tokens: int  # generated
    seconds: float  # of generation, compilation included
    timing: generate.Timing  # of the first turn's first batch
    timed_sequences: int  # in that batch


@dataclasses.dataclass(frozen=True)
class Options:
    """How to evaluate, beside what the setup's config says."""

    sharding: Sharding | None = None
    implementation: str | None = None
    batch_size: int = 64  # conversations generated together
    seed: int = 0


def evaluate(
    setup: Setup,
    params: Params,
    conversations: Sequence[Conversation],
    options: Options = Options(),
) -> Evaluation:
    """Generates every turn of every conversation under `setup.config.sampling`, and scores.

    Raises:
      UserError: no conversations, or `batch_size` below 1.
      DataError: the template cannot show a conversation.
    """
    if not len(conversations):
        raise UserError("nothing to evaluate: no conversations")
    if options.batch_size < 1:
        raise UserError(f"batch_size={options.batch_size} must be at least 1")
    params = generate.prepare(setup.model, params)
    found = [pipeline.samples_of(setup, conversation) for conversation in conversations]
    loss, weight = held_out_loss(setup, params, found, options)
    dialogues = [
        _Dialogue(setup, conversation, index, own)
        for index, (conversation, own) in enumerate(zip(conversations, found, strict=True))
    ]
    first = [dialogue.prompt() for dialogue in dialogues[: options.batch_size] if dialogue.open]
    start = time.perf_counter()
    _generate(setup, params, dialogues, options)
    seconds = time.perf_counter() - start
    timing = generate.measure(
        setup.model,
        params,
        first,
        setup.config.sampling,
        jax.random.key(options.seed),
        sharding=options.sharding,
        implementation=options.implementation,
        valid_vocab=setup.valid_vocab,
    )
    transcripts = [dialogue.transcript() for dialogue in dialogues]
    replies = [reply for transcript in transcripts for reply in transcript.replies]
    scored = [reply.correct for reply in replies if reply.correct is not None]
    return Evaluation(
        rows=_rows(replies, loss, weight),
        exact_match=_mean(scored),
        loss=sum(loss.values()) / sum(weight.values()),
        n=len(scored),
        transcripts=transcripts,
        tokens=sum(reply.tokens for reply in replies),
        seconds=seconds,
        timing=timing,
        timed_sequences=len(first),
    )


def _rows(
    replies: Sequence[Reply], loss: dict[int, float], weight: dict[int, float]
) -> list[dict[str, Any]]:
    rows = []
    for depth in sorted({reply.depth for reply in replies} | set(loss)):
        here = [reply for reply in replies if reply.depth == depth]
        scored = [reply.correct for reply in here if reply.correct is not None]
        rows.append(
            {
                "depth": depth,
                "exact_match": _mean(scored),
                "loss": loss[depth] / weight[depth] if weight.get(depth) else math.nan,
                "n": len(scored),
                "unclosed": sum(not reply.closed for reply in here),
                "cut_off": sum(not reply.stopped for reply in here),
            }
        )
    return rows


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan


# Generation


class _Dialogue:
    """One conversation in progress."""

    def __init__(
        self,
        setup: Setup,
        conversation: Conversation,
        index: int,
        own: Sequence[samples.Sample],
    ):
        self.index = index
        self._setup, self._conversation = setup, conversation
        # thoughts go where training puts them: the renderings of the reference know
        self._inline = any(sample.rendering.inline for sample in own)
        self._trained = {sample.message for sample in own if sample.thread == 0}
        self._depths = depths_of(conversation.messages)
        self._messages: list[Message] = []
        self._replies: list[Reply] = []
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
        data, place = self._setup.config.data, len(self._messages)
        thread = (*self._messages, self._conversation.messages[place])
        kept = samples.keeps_thoughts(thread, place, data.policy)
        shown = [
            samples.as_dict(message, keep, self._inline, self._setup.delimiters)
            for message, keep in zip(self._messages, kept, strict=False)
        ]
        try:
            self._prompt = self._setup.template.render(
                shown, add_generation_prompt=True, tools=self._conversation.tools
            )
            return self._setup.tokenizer.encode(self._prompt)
        except UserError as error:
            where = self._conversation
            raise DataError(where.file, where.line, f"message {place}: {error}") from None

    def write(self, generation: generate.Generation) -> None:
        """Takes the model's message into the history and goes on to its next one."""
        place = len(self._messages)
        reference = self._conversation.messages[place]
        text = self._setup.tokenizer.decode(generation.tokens)
        opened = self._prompt.rstrip().endswith(self._setup.delimiters[0])
        thought, response, closed = split_generation(text, self._setup.delimiters, opened)
        correct = None
        if is_scored(self._conversation.messages, place):
            correct = closed and matches(self._setup.config.data, response, reference.content)
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


def _generate(
    setup: Setup, params: Params, dialogues: Sequence[_Dialogue], options: Options
) -> None:
    """Writes the next message of all open dialogues in one batch, until none is open."""
    key = jax.random.key(options.seed)
    with Progress("messages", None) as progress:
        for step in itertools.count():
            open_ones = [dialogue for dialogue in dialogues if dialogue.open]
            if not open_ones:
                return
            for start in range(0, len(open_ones), options.batch_size):
                batch = open_ones[start : start + options.batch_size]
                generations = generate.generate(
                    setup.model,
                    params,
                    [dialogue.prompt() for dialogue in batch],
                    setup.config.sampling,
                    setup.tokenizer.stop_ids,
                    jax.random.fold_in(key, step),
                    sharding=options.sharding,
                    implementation=options.implementation,
                    valid_vocab=setup.valid_vocab,
                    indices=[dialogue.index for dialogue in batch],
                )
                for dialogue, generation in zip(batch, generations, strict=True):
                    dialogue.write(generation)
                progress.advance(len(batch))


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


# Teacher-forced loss


def held_out_loss(
    setup: Setup,
    params: Params,
    found: Sequence[Sequence[samples.Sample]],
    options: Options = Options(),
) -> tuple[dict[int, float], dict[int, float]]:
    """Sums of loss and of weight by depth, over the edges of each conversation's prefix tree.

    found: the samples of each conversation. An edge that several turns train counts for the first.
    """
    params = generate.prepare(setup.model, params)
    execution = losses.Execution(
        options.sharding, options.implementation, valid_vocab=setup.valid_vocab
    )
    loss: dict[int, float] = collections.defaultdict(float)
    weight: dict[int, float] = collections.defaultdict(float)
    trees = [_tree_and_depths(own) for own in found]
    for group, batch in _loss_batches(trees, options.sharding):
        batch = train.to_device(batch, options.sharding)
        log_probs = np.asarray(_log_probs(setup.model, execution, params, batch), np.float64)
        for row, (layout, depths) in zip(log_probs, group, strict=False):
            for depth in np.unique(depths).tolist():
                weights = layout.edge_weights[depths == depth].astype(np.float64)
                loss[depth] -= float(weights @ row[: layout.num_edges][depths == depth])
                weight[depth] += float(weights.sum())
    return dict(sorted(loss.items())), dict(sorted(weight.items()))


_log_probs = jax.jit(
    lambda model, execution, params, batch: losses.edge_log_probs(model, params, batch, execution),
    static_argnums=(0, 1),
)


def _tree_and_depths(own: Sequence[samples.Sample]) -> tuple[Layout, np.ndarray]:
    """The prefix tree of a conversation and the depth of each of its edges."""
    ((layout,), report) = layouts.layouts_of(own, "tree")
    depths = np.zeros(layout.length, np.int32)
    for path, index in reversed(list(zip(layout.paths, report.members[0], strict=True))):
        sample = own[index]
        thread = sample.conversation.threads()[sample.thread]
        depths[path[sample.prompt_length :]] = depths_of(thread)[sample.message]
    return layout, depths[layout.edge_children]


def _loss_batches(
    trees: Sequence[tuple[Layout, np.ndarray]], sharding: Sharding | None
) -> Iterator[tuple[list[tuple[Layout, np.ndarray]], dict[str, np.ndarray]]]:
    """Batches of one tree a row: of few lengths, and of a number of rows that fits memory."""
    parts = 1 if sharding is None else sharding.size("batch")
    by_size = collections.defaultdict(list)
    for tree in trees:
        layout = tree[0]
        by_size[generate.bucket(max(layout.length, layout.num_edges))].append(tree)
    for size, members in sorted(by_size.items()):
        most = max(_LOSS_TOKENS // (size * parts), 1)
        rows = parts * min(most, 1 << (-(-len(members) // parts) - 1).bit_length())
        for start in range(0, len(members), rows):
            group = members[start : start + rows]
            packed = [packing.pack([layout], size)[0] for layout, _ in group]
            packed += [packing.empty_row(size)] * (rows - len(group))
            yield group, packing.stack(packed)
