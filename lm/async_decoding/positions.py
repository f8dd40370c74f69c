# SPDX-License-Identifier: Apache-2.0
"""Where tokens stand while the main thread runs ahead of its blocks: four schemes of position ids.

Main cannot know how long a promised block will be when it writes on. With p the position of a
promise's last token, len(k) the tokens of block k and N_k those that were promised, both with the
block's opening and end:

| scheme | main after promise k | `<sync/>` |
|---|---|---|
| `predicted` (arXiv 2502.11517) | p + 1 + N_k | goes on |
| `oracle` (for comparison: it cannot be decoded) | p + 1 + len(k) | goes on |
| `fork_join_max` | p + 1 | 1 + max(last main, ends of the blocks that it waits for) |
| `fork_join_sum` | p + 1 | 1 + last main + sum of len(k) |

Block k starts at p + 1 in all of them. "Goes on" is the position of any other main token: one after
the last, or what the table's first column says where a promise comes right before.
"""

import numpy as np

from lm.async_decoding.programs import EncodedProgram
from lm.config import require_choice

SCHEMES = ("predicted", "oracle", "fork_join_max", "fork_join_sum")
DECODABLE = tuple(scheme for scheme in SCHEMES if scheme != "oracle")


def positions_of(program: EncodedProgram, scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """(main, blocks): positions [P + n] int32 of the prompt and the main thread, and [K] int32 of
    the first token of each block, whose other tokens follow.

    Raises:
      UserError: an unknown scheme.
    """
    require_choice("positions", scheme, SCHEMES)
    steps = np.ones(len(program.prompt) + len(program.main), np.int64)
    steps[:1] = 0
    main_forks = len(program.prompt) + program.forks
    after = main_forks + 1
    inside = after < len(steps)  # a program may end in a promise while it is being written
    ahead = {"predicted": program.reserved, "oracle": program.lengths}.get(scheme)
    if ahead is not None:
        steps[after[inside]] += ahead[inside]
        main = np.cumsum(steps)
        return main.astype(np.int32), (main[main_forks] + 1).astype(np.int32)
    main = np.cumsum(steps)
    first = 0  # of the group's promises
    for sync in program.syncs:
        last = int(np.searchsorted(program.forks, sync))
        at = len(program.prompt) + int(sync)
        lengths = program.lengths[first:last]
        if len(lengths):
            if scheme == "fork_join_sum":
                jump = int(lengths.sum())
            else:  # `main[at]` is one after the last main token so far
                ends = main[main_forks[first:last]] + lengths
                jump = max(int(ends.max()) + 1 - int(main[at]), 0)
            main[at:] += jump
        first = last
    return main.astype(np.int32), (main[main_forks] + 1).astype(np.int32)
