# SPDX-License-Identifier: Apache-2.0
"""Plain text for language-model training: documents become chains of tokens in packed rows.

A document is trained from its first token to the token that ends it. One longer than a row becomes
pieces that overlap by a token, so that each of its tokens is still predicted exactly once;
documents, and pieces of one, never see each other.
"""

import dataclasses
import operator
import os
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import grain
import numpy as np

from lm.data import packing
from lm.data.layout import Layout
from lm.data.messages import Conversation
from lm.data.python_source import Document
from lm.text.chat import ChatTemplate
from lm.text.tokenizers import Tokenizer

# Tokenising a document leaves Python, so threads do it side by side; order stays as it is.
_THREADS = min(8, os.cpu_count() or 1)
_READ = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=max(16, 4 * _THREADS))
_ROOM = 1 << 27  # tokens kept in memory: half a gigabyte


def texts_of(record: Document | Conversation, template: ChatTemplate) -> Iterator[str]:
    """What is trained of a record: a document's text, or each thread of a conversation as the
    template renders it, thoughts included."""
    if isinstance(record, Document):
        yield record.text
        return
    for thread in record.threads():
        messages = [message.to_dict(with_thought=True) for message in thread]
        yield template.render(messages, add_generation_prompt=False, tools=record.tools)


def tokens_of(
    record: Document | Conversation, template: ChatTemplate, tokenizer: Tokenizer
) -> list[np.ndarray]:
    """The tokens [n] int32 of each text of a record.

    A document opens with the tokenizer's bos and closes with its eos, where it has them; a rendered
    conversation already holds whatever its template writes.
    """
    ids = tokenizer.encode_batch(list(texts_of(record, template)))
    if isinstance(record, Conversation):
        return ids
    marks = (tokenizer.bos, tokenizer.eos)
    before, after = ([] if mark is None else [tokenizer.token_id(mark)] for mark in marks)
    return [np.concatenate([before, i, after]).astype(np.int32) for i in ids]


def chain(tokens: np.ndarray) -> Layout:
    """One layout of tokens [n] int32, each trained from those before it."""
    size = len(tokens)
    rows = np.arange(size, dtype=np.int32)
    count = max(size - 1, 0)
    return Layout(
        tokens=tokens,
        positions=rows,
        until=np.full(size, size, np.int32),
        edge_rows=rows[:count],
        edge_targets=tokens[1:],
        edge_weights=np.ones(count, np.float32),
        edge_turn_weights=np.full(count, 1 / max(count, 1), np.float32),
        edge_children=rows[1:],
        edge_turns=np.zeros(count, np.int32),
        paths=(rows,),
    )


def chains(tokens: np.ndarray, seq_len: int) -> list[Layout]:
    """Chains of at most `seq_len` tokens that train each of tokens [n] but the first, once.

    Raises:
      ValueError: a `seq_len` below 2 trains nothing.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, got {seq_len}")
    starts = range(0, len(tokens) - 1, seq_len - 1)
    return [chain(tokens[start : start + seq_len]) for start in starts]


class Tokenised(Sequence[list[np.ndarray]]):
    """The tokens of each record by index, kept once made, as far as there is room.

    Small models train faster than one core tokenises; a corpus that fits is tokenised once.
    """

    def __init__(
        self,
        source: Sequence[Document] | Sequence[Conversation],
        template: ChatTemplate,
        tokenizer: Tokenizer,
        room: int = _ROOM,
    ):
        """room: how many tokens are kept."""
        self._source, self._template, self._tokenizer = source, template, tokenizer
        self._room, self._kept = room, {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> list[np.ndarray]:
        number = operator.index(index)
        found = self._kept.get(number)
        if found is None:
            found = tokens_of(self._source[number], self._template, self._tokenizer)
            size = sum(map(len, found))
            if size <= self._room:
                self._room -= size
                self._kept[number] = found
        return found

    def __repr__(self) -> str:
        # a data iterator's saved position names its source
        return f"Tokenised({self._source!r}, {self._tokenizer.fingerprint})"


@dataclasses.dataclass(frozen=True)
class ToGroup(grain.transforms.Map):
    """The tokens of a record -> its chains, with counts of what they hold."""

    seq_len: int

    def map(self, texts: list[np.ndarray]) -> packing.Group:
        made = [layout for tokens in texts for layout in chains(tokens, self.seq_len)]
        trained = sum(layout.num_edges for layout in made)
        return packing.Group(made, {"documents": len(texts), "trained_tokens": trained})


def rows(
    source: Sequence[Document] | Sequence[Conversation],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    window: int,
    seed: int = 0,
    epochs: int | None = 1,
    shuffle: bool = True,
    process: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Packed rows of plain text; `packing.batches` follows.

    Args:
      seq_len: S, tokens of a row, and of the longest piece of a document.
      window: pieces that packing looks at together.
      epochs: None goes on forever.
      process: (index, count) of the host.
    """
    tokens = Tokenised(source, template, tokenizer)
    dataset = grain.MapDataset.source(tokens).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(epochs)[process[0] :: process[1]]
    dataset = dataset.map(ToGroup(seq_len))
    return packing.PackedRows(dataset.to_iter_dataset(_READ), seq_len, window)
