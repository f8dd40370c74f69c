# SPDX-License-Identifier: Apache-2.0
"""The masks that attention is timed under: what training really computes, at any length.

Each is a `Visibility` of one sequence, repeated over the batch, with the exact number of pairs that
it makes visible: rates are per visible pair, so that no mask looks fast for being sparse.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from lm.single_pass import tree
from ops.visibility import Visibility

ONE_PASS_TURN = (64, 512, 192)  # human, thought and response tokens
DOCUMENT = (128, 2048)  # fewest and most tokens of a packed document
WINDOW = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask with a name; `pairs` is the number of visible (row, key) pairs over the batch."""

    name: str
    visibility: Visibility
    pairs: int
    causal: bool = False  # plain: what a dense kernel can compute as well


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of an async program: main text around promises, their blocks, and perhaps a sync.

    `texts[k]` main tokens are written after k promises, the next promise's own included; so there
    is one text more than there are blocks.
    """

    texts: Sequence[int]
    blocks: Sequence[int]
    synced: bool = True


class _Sample(NamedTuple):
    tokens: np.ndarray
    prompt_length: int
    turn: int


def visible_pairs(visibility: Visibility, num_rows: int) -> int:
    """Visible pairs over the batch, counted key by key: no [T, S] array."""
    until = np.asarray(visibility.until, np.int64)
    offset = visibility.row_offset
    first = np.zeros((len(until), 1), np.int64) if offset is None else np.asarray(offset)[:, None]
    start = np.maximum(np.arange(until.shape[1]), first)
    end = np.minimum(until, first + num_rows)
    count = np.maximum(end - start, 0)
    if visibility.hidden_from is not None:
        hidden_start = np.maximum(np.asarray(visibility.hidden_from), start)
        hidden_end = np.minimum(np.asarray(visibility.hidden_until), end)
        count -= np.maximum(hidden_end - hidden_start, 0)
    return int(count.sum())


def conversation(turns: int, turn: Sequence[int] = ONE_PASS_TURN, seed: int = 0) -> np.ndarray:
    """[n] `until` of one conversation of random tokens, laid out as a prefix tree for training."""
    rng = np.random.default_rng(seed)
    history, samples = np.zeros(0, np.int32), []
    for number in range(turns):
        human, thought, response = (rng.integers(0, 2**31 - 1, n, np.int32) for n in turn)
        prompt = np.concatenate([history, human])
        samples.append(_Sample(np.concatenate([prompt, thought, response]), len(prompt), number))
        history = np.concatenate([prompt, response])
    return tree.build_tree(samples).until


def async_program(prompt: int, groups: Sequence[Group]) -> np.ndarray:
    """[3, n] `until`, `hidden_from` and `hidden_until` of one document in grouped order: each
    group's main tokens, its blocks, its sync; blocks that no sync waits for follow the last main
    token."""
    count = prompt + sum(sum(g.texts) + sum(g.blocks) + g.synced for g in groups)
    until, hidden_from = np.full(count, count), np.full(count, count)
    hidden_until = np.zeros(count, int)
    at = prompt
    for group in groups:
        blocks_at = at + sum(group.texts)
        ends = blocks_at + np.cumsum([0, *group.blocks])
        sync = ends[-1] if group.synced else count
        for promises, text in enumerate(group.texts):
            if promises:  # the blocks promised before these tokens never see them
                hidden_from[at : at + text] = blocks_at
                hidden_until[at : at + text] = ends[promises]
            at += text
        for block, end in zip(group.blocks, ends[1:], strict=True):
            hidden_from[at : at + block] = end
            hidden_until[at : at + block] = sync
            at += block
        at += group.synced
    return np.stack([until, hidden_from, hidden_until])


def draw_program(rng: np.random.Generator, scale: int = 64) -> np.ndarray:
    """[3, n] as `async_program`: one to four groups of one to six promises, texts of about `scale`
    tokens and blocks of about three times as many; the last group may lack its sync."""
    groups = []
    for remaining in reversed(range(int(rng.integers(1, 5)))):
        promises = int(rng.integers(1, 7))
        texts = rng.integers(scale // 4 + 1, 2 * scale, promises + 1)
        blocks = rng.integers(scale // 2 + 1, 6 * scale, promises)
        synced = bool(remaining or rng.integers(2))
        groups.append(Group(texts.tolist(), blocks.tolist(), synced))
    return async_program(int(rng.integers(scale, 8 * scale)), groups)


def end_to_end(documents: Callable[[], np.ndarray], length: int) -> np.ndarray:
    """[3, length]: `documents()` ([3, n] each, indices local) one after another, the last cut."""
    parts, used = [], 0
    while used < length:
        parts.append(documents() + used)
        used += parts[-1].shape[1]
    joined = np.concatenate(parts, axis=1)[:, :length]
    joined[0] = np.minimum(joined[0], length)
    return joined


def one_pass(length: int, turns: int | None = None, seed: int = 0) -> Visibility:
    """Conversations of `turns` turns, the last cut; None: as many turns as fit the row at once."""
    per_turn = 2 * ONE_PASS_TURN[2] + sum(ONE_PASS_TURN[:2])
    if turns is None:  # the last turn's answer has no copy for what follows
        turns = max(1, (length + ONE_PASS_TURN[2]) // per_turn)
    until = conversation(turns, seed=seed)
    repeats = -(-length // len(until))
    joined = np.concatenate([until + n * len(until) for n in range(repeats)])[:length]
    return _visibility(np.minimum(joined, length))


def documents(length: int, seed: int = 0, sizes: tuple[int, int] = DOCUMENT) -> Visibility:
    """Packed short documents of drawn lengths, the last cut."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(sizes[0], sizes[1] + 1, -(-length // sizes[0]))
    ends = np.cumsum(lengths)
    return _visibility(np.minimum(ends[np.searchsorted(ends, np.arange(length), "right")], length))


def async_programs(length: int, seed: int = 0) -> Visibility:
    """Packed programs of promises and blocks, the last cut."""
    rng = np.random.default_rng(seed)
    return _visibility(*end_to_end(lambda: draw_program(rng), length))


def _visibility(*vectors: np.ndarray) -> Visibility:
    return Visibility(*(jnp.asarray(vector[None], jnp.int32) for vector in vectors))


def _causal(length: int, seed: int) -> Visibility:
    del seed
    return Visibility.causal(1, length)


def _sliding_window(length: int, seed: int) -> Visibility:
    del seed
    return Visibility.sliding_window(Visibility.causal(1, length).until, WINDOW)


CASES: Mapping[str, Callable[[int, int], Visibility]] = {
    "one_pass": lambda length, seed: one_pass(length, seed=seed),
    "documents": documents,
    "async": async_programs,
    "causal": _causal,
    "sliding_window": _sliding_window,
}


def case(name: str, length: int, batch: int = 1, seed: int = 0) -> Case:
    """The named mask over `length` rows and keys, the same for each of the batch. Raises
    UserError."""
    if name not in CASES:
        raise UserError(f"mask {name!r} is not one of {', '.join(CASES)}")
    one = CASES[name](length, seed)
    vectors = (one.until, one.hidden_from, one.hidden_until)
    repeated = (None if x is None else jnp.tile(x, (batch, 1)) for x in vectors)
    return Case(name, Visibility(*repeated), batch * visible_pairs(one, length), name == "causal")
