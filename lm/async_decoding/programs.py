# SPDX-License-Identifier: Apache-2.0
"""A program as token ids, thread by thread: what layouts, positions and critical paths are made
of."""

import dataclasses

import numpy as np

from lm.async_decoding import language
from lm.async_decoding.language import Program, Promise, Text
from lm.text.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class EncodedProgram:
    """Token ids of an answer and of the prompt before it.

    The main thread holds text, promises, syncs and the end token; forks and syncs are indices into
    it, ascending. Block k, 0-based, is `openings[k]`, `blocks[k]`, and the token `close`.
    """

    prompt: np.ndarray  # [P] int32
    main: np.ndarray  # [n] int32
    forks: np.ndarray  # [K] int64, the last token of each promise
    syncs: np.ndarray  # [s] int64
    tokens: np.ndarray  # [K] int64, what each promise says
    openings: tuple[np.ndarray, ...]  # K times [F] int32, at least one token each
    blocks: tuple[np.ndarray, ...]  # K times [L] int32
    close: int

    @property
    def num_blocks(self) -> int:
        return len(self.forks)

    @property
    def lengths(self) -> np.ndarray:
        """[K] int64: the tokens of each block, opening and end included."""
        sizes = [len(o) + len(b) + 1 for o, b in zip(self.openings, self.blocks, strict=True)]
        return np.array(sizes, np.int64)

    @property
    def reserved(self) -> np.ndarray:
        """[K] int64: the tokens that each promise announces, opening and end included."""
        return self.tokens + np.array([len(o) + 1 for o in self.openings], np.int64)

    @property
    def size(self) -> int:
        """All tokens, the prompt's included."""
        return len(self.prompt) + len(self.main) + int(self.lengths.sum())

    @property
    def groups(self) -> np.ndarray:
        """[K] int64: how many syncs come before each promise."""
        return np.searchsorted(self.syncs, self.forks)


def encode(program: Program, prompt: np.ndarray, tokenizer: Tokenizer, end: int) -> EncodedProgram:
    """A program as token ids. Texts, topics and numbers are tokenised apart from each other, as the
    decoder would write them.

    Args:
      prompt: ids [P] of what comes before.
      tokenizer: one that has the tags.
      end: the token that ends the answer.
    """
    ids = language.tag_ids(tokenizer)
    promises = program.promises
    texts = [item.text for item in program.items if isinstance(item, Text)]
    numbers = [str(promise.tokens) for promise in promises]
    topics = [promise.topic for promise in promises]
    encoded = tokenizer.encode_batch([*texts, *numbers, *topics, *program.threads])
    count = len(promises)
    blocks = tuple(encoded[len(encoded) - count :])
    topic_ids = encoded[len(encoded) - 2 * count : len(encoded) - count]
    number_ids = iter(encoded[len(texts) : len(texts) + count])
    text_ids, next_topic = iter(encoded[: len(texts)]), iter(topic_ids)
    main: list[int] = []
    forks, syncs = [], []
    for item in program.items:
        if isinstance(item, Text):
            main.extend(next(text_ids).tolist())
        elif isinstance(item, Promise):
            main += [ids[language.PROMISE], *next(next_topic).tolist(), ids[language.TOKENS]]
            main += [*next(number_ids).tolist(), ids[language.PROMISE_END]]
            forks.append(len(main) - 1)
        else:
            syncs.append(len(main))
            main.append(ids[language.SYNC])
    openings = tuple(
        np.array([ids[language.ASYNC], *t.tolist(), ids[language.ASYNC_BODY]], np.int32)
        for t in topic_ids
    )
    return EncodedProgram(
        prompt=np.asarray(prompt, np.int32),
        main=np.array([*main, end], np.int32),
        forks=np.array(forks, np.int64),
        syncs=np.array(syncs, np.int64),
        tokens=np.array([promise.tokens for promise in promises], np.int64),
        openings=openings,
        blocks=blocks,
        close=ids[language.ASYNC_END],
    )
