# SPDX-License-Identifier: Apache-2.0
"""From sampled answers to the rows of preference optimisation.

An answer is trained on as it was decoded, token by token: texts are not tokenised again, since
another cut of the same text would have another probability. A promise is where the decoder forked;
what it put there itself (openings, the end of a block that ran into its cap) is in the layout
without a label.

Malformed answers are scored by their repaired text. They can lose, and then their own tokens become
less likely, the broken ones included; they never win, so that nothing teaches a tag that the parser
refuses. Answers that were cut off count as malformed.
"""

import collections
import dataclasses
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from lm.async_decoding import assembly, language, layout
from lm.async_decoding.answers import Answer, Thread
from lm.async_decoding.language import LanguageError
from lm.async_decoding.programs import EncodedProgram
from lm.data import packing
from lm.data.layout import EDGE_FIELDS, HIDDEN_FIELDS, Layout
from lm.text.tokenizers import Tokenizer

# --- answers in files


def to_record(answer: Answer) -> dict[str, Any]:
    """An answer as JSON, without its text, which its tokens give."""
    threads = [[t.ids.tolist(), t.forced, t.steps.tolist()] for t in answer.threads]
    return {
        "threads": threads,
        "steps": answer.steps,
        "finished": answer.finished,
        "seconds": answer.seconds,
    }


def from_record(
    prompt: str, record: Mapping[str, Any], tokenizer: Tokenizer, stop_ids: Sequence[int]
) -> Answer:
    """The inverse of `to_record`, of an answer in the language itself."""
    threads = tuple(
        Thread(np.array(ids, np.int32), forced, np.array(steps, np.int32))
        for ids, forced, steps in record["threads"]
    )
    main, *blocks = [thread.ids for thread in threads]
    return Answer(
        prompt=prompt,
        assembly=assembly.assemble_ids(main, blocks, tokenizer, stop_ids),
        threads=threads,
        steps=record["steps"],
        finished=record["finished"],
        seconds=record["seconds"],
    )


# --- an answer as a program


@dataclasses.dataclass(frozen=True)
class Decoded:
    """The program of what was decoded, and how its blocks ended: by default `</async>` came out and
    is trained; here are the others (0-based) with the token that came out instead, or None where
    nothing did, since the cap, or the end of all, cut the block off."""

    program: EncodedProgram
    ends: Mapping[int, int | None]


def promises_of(
    main: np.ndarray, tokenizer: Tokenizer, stop_ids: Sequence[int]
) -> list[tuple[int, int, np.ndarray]]:
    """(its last token, the number that it says, the ids of its topic) of each complete promise of a
    main thread."""
    pieces = language.pieces_of_ids(main, tokenizer, stop_ids)
    found, at = [], 0
    while at < len(pieces):
        promise = assembly.complete_promise(pieces, at)
        if promise is not None:
            _, number, taken = promise
            first, divides = pieces[at].position + 1, pieces[at + taken - 3].position
            found.append((pieces[at + taken - 1].position, number, main[first:divides]))
        at += 1 if promise is None else promise[2]
    return found


def program_of(
    answer: Answer, prompt: np.ndarray, tokenizer: Tokenizer, stop_ids: Sequence[int]
) -> Decoded | None:
    """The program of what was decoded; None where promises and threads do not belong together.

    A block that ended in an end of answer was continued as after `</async>`: that is what its
    layout holds, and the end of answer is what its last token predicted. Promises whose block had
    not begun when the answer was cut off have an empty one, since they moved what main wrote after
    them.
    """
    ids = language.tag_ids(tokenizer)
    main, *threads = answer.threads
    found = promises_of(main.ids, tokenizer, stop_ids)
    if len(found) < len(threads):
        return None
    openings, blocks = [], []
    ends: dict[int, int | None] = {}
    for number, (_, _, topic) in enumerate(found):
        begin = [ids[language.ASYNC], *topic.tolist(), ids[language.ASYNC_BODY]]
        opening, text = np.array(begin, np.int32), np.zeros(0, np.int32)
        if number < len(threads):
            one = threads[number]
            opening, text = one.ids[: one.forced], one.ids[one.forced :]
        last = int(text[-1]) if len(text) else None
        if last == ids[language.ASYNC_END]:
            text = text[:-1]
        elif last in stop_ids:
            text, ends[number] = text[:-1], last
        else:
            ends[number] = None
        openings.append(opening)
        blocks.append(text)
    program = EncodedProgram(
        prompt=np.asarray(prompt, np.int32),
        main=main.ids,
        forks=np.array([at for at, _, _ in found], np.int64),
        syncs=np.flatnonzero(main.ids == ids[language.SYNC]),
        tokens=np.array([language.clamp(number) for _, number, _ in found], np.int64),
        openings=tuple(openings),
        blocks=tuple(blocks),
        close=ids[language.ASYNC_END],
    )
    return Decoded(program, ends)


def layout_of(decoded: Decoded, scheme: str) -> Layout:
    """The layout of a decoded program, in which everything that came out is predicted and nothing
    else."""
    made = layout.layout_of(decoded.program, scheme)
    rows = layout.places_of(decoded.program).ends - 1  # where `</async>` lies
    targets, kept = made.edge_targets.copy(), np.ones(made.num_edges, bool)
    for number, token in decoded.ends.items():
        at = made.edge_children == rows[number]
        if token is None:
            kept &= ~at
        else:
            targets[at] = token
    count = int(kept.sum())
    fields = {name: getattr(made, name)[kept] for name in (*EDGE_FIELDS, "edge_children")}
    fields["edge_targets"] = targets[kept]
    fields["edge_turn_weights"] = np.full(count, 1 / max(count, 1), np.float32)
    fields["edge_turns"] = made.edge_turns[kept]
    return dataclasses.replace(made, **fields)


def well_formed(answer: Answer, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> bool:
    """Whether an answer is a valid program, decoded to its end, blocks included."""
    found = program_of(answer, np.zeros(1, np.int32), tokenizer, stop_ids)
    if not answer.finished or found is None or found.ends:
        return False
    main, *blocks = [thread.ids for thread in answer.threads]
    try:
        language.validate(language.parse_ids(main, blocks, tokenizer, stop_ids))
    except LanguageError:
        return False
    return True


# --- the best and the worst


Score = tuple[float, ...]


def score(speed: float, quality: float, weight: float) -> Score:
    """What a sample is ranked by. The limit of large weights is quality first, and speed among
    those as good."""
    return (quality, speed) if np.isinf(weight) else (speed + weight * quality,)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two samples of a prompt: which is preferred to which."""

    prompt: int
    best: int
    worst: int
    reference: tuple[float, float] = (0.0, 0.0)  # log-probabilities at the start of the round


def choose(
    scores: Sequence[Score], may_win: Sequence[bool], may_lose: Sequence[bool]
) -> tuple[int, int] | str:
    """(best, worst) of a prompt's samples, of equals the first; or why there is none: no sample may
    win ("malformed") or lose, or all that may are as good ("tied")."""
    winners = [i for i, allowed in enumerate(may_win) if allowed]
    losers = [i for i, allowed in enumerate(may_lose) if allowed]
    if not winners:
        return "malformed"
    best = max(winners, key=scores.__getitem__)
    worst = min(losers, key=scores.__getitem__, default=best)
    return (best, worst) if scores[best] > scores[worst] else "tied"


# --- rows


def row_of(best: Layout, worst: Layout, reference: tuple[float, float], size: int) -> packing.Row:
    """A row [size] of both, with what belongs to which: `chosen` and `rejected` are 1 on the edges
    of the best and of the worst."""
    (row,) = packing.pack([best, worst], size)
    edges = np.arange(size)
    chosen = edges < best.num_edges
    rejected = ~chosen & (edges < best.num_edges + worst.num_edges)
    return row | {
        "chosen": chosen.astype(np.float32),
        "rejected": rejected.astype(np.float32),
        "reference": np.array(reference, np.float32),
        "pair": np.float32(1.0),
    }


def padding_of(row: packing.Row) -> packing.Row:
    """A row of no pair, of the shape of another."""
    out = {name: np.zeros_like(value) for name, value in row.items()}
    return out | packing.empty_row(len(row["tokens"]), HIDDEN_FIELDS[0] in row)


class Rows(Sequence[packing.Row]):
    """The row of each pair by index, for `grain.MapDataset.source`."""

    def __init__(self, rows: Sequence[packing.Row], name: str):
        """name: a data iterator's saved position names its source by it."""
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> packing.Row:
        return self._rows[operator.index(index)]

    def __repr__(self) -> str:
        return f"Rows({self._name})"


def stacked(rows: Sequence[packing.Row], batch_size: int) -> dict[str, np.ndarray]:
    """A batch, completed with rows of no pair."""
    return packing.stack([*rows, *[padding_of(rows[0])] * (batch_size - len(rows))])


def counted(reasons: Sequence[str]) -> dict[str, int]:
    """How often each reason came up."""
    return dict(collections.Counter(reasons))


def dumps(pairs: Sequence[Pair]) -> str:
    """Pairs as JSON lines."""
    return "".join(json.dumps(dataclasses.asdict(pair)) + "\n" for pair in pairs)


def loads(text: str) -> list[Pair]:
    """The inverse of `dumps`."""
    found = [json.loads(line) for line in text.split("\n") if line]
    return [Pair(**{**one, "reference": tuple(one["reference"])}) for one in found]
