# SPDX-License-Identifier: Apache-2.0
"""How many decoder steps an answer takes when its blocks are written beside the main thread.

A step feeds one token to every active thread. Main takes one step per token, syncs and the end
included; a block that is promised at step t with an opening of F tokens and a text of L ends at
t + F + L, when its end comes out; a sync is one main token, after which main waits for the blocks
that it names. The answer ends with its last thread.
"""

import dataclasses
import math
from collections.abc import Iterable

from lm.async_decoding.programs import EncodedProgram


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When things happen, in steps from the first token of the answer, which comes out at 1."""

    forks: tuple[int, ...]  # per block, when its promise was complete
    ends: tuple[int, ...]  # per block
    syncs: tuple[tuple[int, int], ...]  # (written, passed) of each
    main_end: int  # when main wrote its end token
    decoded: int  # tokens that came out, over all threads; openings are put there

    @property
    def steps(self) -> int:
        """The critical path."""
        return max([self.main_end, *self.ends])

    @property
    def parallelism(self) -> float:
        """Tokens per step: what the same answer would take sequentially over what it takes."""
        return self.decoded / self.steps


def timeline(program: EncodedProgram) -> Timeline:
    """The steps of a program's answer."""
    forks: list[int] = []
    ends: list[int] = []
    syncs = []
    done = 0  # main tokens so far
    clock = 0
    next_fork = 0
    for sync in [*program.syncs.tolist(), len(program.main)]:
        while next_fork < program.num_blocks and program.forks[next_fork] < sync:
            promised = clock + int(program.forks[next_fork]) + 1 - done
            opening, text = program.openings[next_fork], program.blocks[next_fork]
            forks.append(promised)
            ends.append(promised + len(opening) + len(text))
            next_fork += 1
        if sync == len(program.main):
            break
        written = clock + sync + 1 - done
        clock, done = max([written, *ends]), sync + 1
        syncs.append((written, clock))
    decoded = len(program.main) + sum(len(text) + 1 for text in program.blocks)
    main_end = clock + len(program.main) - done
    return Timeline(tuple(forks), tuple(ends), tuple(syncs), main_end, decoded)


def critical_path(program: EncodedProgram) -> int:
    """Decoder steps of the answer."""
    return timeline(program).steps


def speedup(baseline_tokens: int, steps: int) -> float:
    """Tokens of the sequential baseline's answer, its end included, over the steps of this one: a
    shorter answer counts as faster, as in the paper."""
    return baseline_tokens / steps


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers, at least one."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs))
