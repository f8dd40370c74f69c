# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from lm.async_decoding import critical_path, simulate


def run_steps(program):
    """A decoder, step by step: each active thread is fed one token, and one comes out of it."""
    step = 0
    main_next, main_done = 0, False  # the main token that comes out next
    waiting = False  # main wrote a sync and cannot feed it yet
    blocks = []  # [tokens that still come out or are fed, ended at]
    barriers = set(program.syncs.tolist())
    forks = {at: k for k, at in enumerate(program.forks.tolist())}
    while not (main_done and all(left == 0 for left, _ in blocks)):
        step += 1
        if waiting and all(left == 0 for left, _ in blocks):
            waiting = False
        born = []
        if not main_done and not waiting:
            waiting = main_next in barriers
            if main_next in forks:
                k = forks[main_next]
                # feeding the last token of the opening brings the first token of the text out
                born.append([len(program.openings[k]) + len(program.blocks[k]), 0])
            main_next += 1
            main_done = main_next == len(program.main)
        for block in blocks:
            if block[0]:
                block[0] -= 1
                block[1] = step
        blocks += born
    return step


@pytest.mark.parametrize("seed", range(10))
def test_the_formula_counts_steps(seed):
    rng = np.random.default_rng(seed)
    for _ in range(60):
        program = simulate.random_program(rng)
        line = critical_path.timeline(program)
        assert line.steps == run_steps(program)
        assert line.decoded == len(program.main) + sum(len(b) + 1 for b in program.blocks)
        assert all(start < end for start, end in zip(line.forks, line.ends, strict=True))
        assert line.parallelism == line.decoded / line.steps


def test_two_parts_at_once():
    program = simulate.EncodedProgram(
        prompt=np.zeros(3, np.int32),
        main=np.arange(12, dtype=np.int32),  # two promises of 4, a sync, 2 more, the end
        forks=np.array([3, 7]),
        syncs=np.array([8]),
        tokens=np.array([20, 20]),
        openings=(np.zeros(2, np.int32),) * 2,
        blocks=(np.zeros(20, np.int32), np.zeros(10, np.int32)),
        close=0,
    )
    line = critical_path.timeline(program)
    assert line.forks == (4, 8)
    assert line.ends == (26, 20)
    assert line.syncs == ((9, 26),)
    assert line.steps == critical_path.critical_path(program) == 29
    assert critical_path.speedup(58, line.steps) == 2.0
    assert critical_path.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
