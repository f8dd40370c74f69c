# SPDX-License-Identifier: Apache-2.0
"""The layout of One-Pass to Reason (arXiv 2504.18246), with its order and visibility corrected.

Turn k is source h_k, thought t_k, response r_k. Where there is a thought the response stands twice:
the output copy sees the thought and is trained, the context copy is what later turns see.

| segment | position starts at | visible to | trained |
|---|---|---|---|
| source h_k | c | all later rows | no |
| thought t_k | c + len(h) | itself and the output copy | yes |
| output copy of r_k | c + len(h) + len(t) | itself | yes |
| context copy of r_k | c + len(h) | all later rows | no |

and c grows by len(h) + len(r). The published order puts the context copy before the output copy, so
the first response token is predicted from a row that cannot see the thought; and it never trains a
turn without a thought. Here such a turn has one copy, which is context and is trained.

h, t and r are derived from the samples: r_k is the longest end of completion_k with which the next
turn's prompt goes on after prompt_k; all that follows it there, trailing template text included, is
h_{k+1}. The context copy of the last response is on no sample's path: nothing reads it.
"""

from collections.abc import Sequence

import numpy as np

from lm.data.layout import Layout
from lm.errors import DataError
from lm.single_pass import tree
from lm.single_pass.samples import Sample, response_start


def refusal(sample: Sample) -> str | None:
    """Why a sample's conversation has no duplicate layout, as far as its messages tell."""
    conversation = sample.conversation
    if conversation is None:
        return None
    if conversation.branches:
        return "the duplicate layout is linear: it has no place for branches"
    if any(message.role == "tool" or message.tool_calls for message in conversation.messages):
        return "the duplicate layout knows plain turns only: it has no place for tool calls"
    return None


def response_lengths(samples: Sequence[Sample]) -> list[int]:
    """len(r_k) of each turn; 0 for a last turn of which only the tokens are known.

    Raises:
      DataError: the samples are not the turns of one plain conversation.
    """
    lengths = []
    for index, sample in enumerate(samples):
        reason = refusal(sample)
        if reason is None and index + 1 < len(samples):
            length = _continued(sample, samples[index + 1])
            if length:
                lengths.append(length)
                continue
            reason = (
                f"the prompt of turn {samples[index + 1].turn} does not go on with the prompt and"
                f" the response of turn {sample.turn}, as the duplicate layout needs"
            )
        if reason is not None:
            raise DataError(sample.file, sample.line, reason)
        start = response_start(sample)
        lengths.append(0 if start is None else len(sample.tokens) - start)
    return lengths


def _continued(sample: Sample, following: Sample) -> int:
    """Length of the longest end of the completion with which the next prompt goes on; 0: none."""
    prompt = sample.prompt_length
    before, after = following.tokens[: following.prompt_length], sample.tokens[prompt:]
    if len(before) <= prompt or not np.array_equal(before[:prompt], sample.tokens[:prompt]):
        return 0
    rest = before[prompt:]
    for start in np.flatnonzero(after == rest[0]):
        if np.array_equal(rest[: len(after) - start], after[start:]):
            return len(after) - int(start)
    return 0


def sizes(samples: Sequence[Sample], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Per turn: rows that its completion takes, and rows of the context copy after it."""
    out = []
    for sample, length in zip(samples, lengths, strict=True):
        completion = len(sample.tokens) - sample.prompt_length
        out.append((completion, 0 if length == completion else length))
    return out


def build(samples: Sequence[Sample], lengths: Sequence[int], last_copy: bool = True) -> Layout:
    """The duplicate layout of consecutive turns.

    Args:
      samples: the turns; what precedes the first one's completion is its source.
      lengths: len(r_k), from `response_lengths`.
      last_copy: whether the last response gets its context copy too, which nothing reads: the
        publication has it.
    """
    tokens, positions, until, above, paths = [], [], [], [], []
    trunk: list[np.ndarray] = []  # rows that later turns see
    row, depth = 0, 0
    parent = -1

    def segment(part: np.ndarray, at: int, after: int, closed: bool) -> np.ndarray:
        nonlocal row
        rows = np.arange(row, row + len(part), dtype=np.int32)
        row += len(part)
        tokens.append(part)
        positions.append(np.arange(at, at + len(part), dtype=np.int32))
        until.append(np.full(len(part), row if closed else -1, np.int32))
        up = rows - 1
        up[:1] = after
        above.append(up)
        return rows

    for index, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        prompt, completion = sample.prompt_length, sample.tokens[sample.prompt_length :]
        source = segment(sample.tokens[depth:prompt], depth, parent, closed=False)
        trunk.append(source)
        parent = int(source[-1]) if len(source) else parent
        plain = length == len(completion)
        trained = segment(completion, prompt, parent, closed=not plain)
        paths.append(np.concatenate([*trunk, trained]))
        depth = prompt + length
        kept = trained
        if not plain and (last_copy or index + 1 < len(samples)):
            kept = segment(completion[len(completion) - length :], prompt, parent, closed=False)
        trunk.append(kept)
        parent = int(kept[-1]) if len(kept) else parent
    ends = np.concatenate(until)
    return tree.edges_to_layout(
        tokens=np.concatenate(tokens).astype(np.int32, copy=False),
        positions=np.concatenate(positions),
        until=np.where(ends < 0, np.int32(row), ends),
        above=np.concatenate(above),
        paths=paths,
        samples=samples,
    )
