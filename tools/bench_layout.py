# SPDX-License-Identifier: Apache-2.0
"""Speed of layout building on one core: from token ids of samples to packed rows.

    python -m tools.bench_layout [--seq_len=8192] [--window=1024] [--tokens=2000000]

Prints one JSON line per shape of conversation. `tokens_per_s` counts n_pass tokens, those that
training without sharing would read; rendering and tokenising are not part of it. `per_cpu_s` is by
the processor's clock, which other processes do not slow down. `grain_per_cpu_s` is the same inside
the dataset that training reads, where grain itself takes some 20 us per conversation.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable

import grain
import numpy as np

from lm.data import packing
from lm.single_pass import layouts
from lm.single_pass.samples import Sample

# name: (turns, human, thought, response), tokens of a segment being drawn from half to 1.5 times
SHAPES = {
    "one_turn_of_15": (1, 15, 15, 15),
    "two_turns_of_15": (2, 15, 15, 15),
    "four_turns_of_15": (4, 15, 15, 15),
    "eight_turns_of_15": (8, 15, 15, 15),
    "eight_turns_of_15_no_thought": (8, 15, 0, 15),
    "forty_turns_of_15": (40, 15, 15, 15),
    "eight_turns_100_300_100": (8, 100, 300, 100),
}


def conversation(rng: np.random.Generator, turns: int, *segments: int) -> list[Sample]:
    """The samples of one conversation of random tokens, thoughts dropped from the history."""
    history = np.zeros(0, np.int32)
    samples = []
    for turn in range(turns):
        sizes = [int(rng.integers(size - size // 2, size + size // 2 + 1)) for size in segments]
        human, thought, response = (rng.integers(0, 100_000, n, np.int32) for n in sizes)
        prompt = np.concatenate([history, human])
        tokens = np.concatenate([prompt, thought, response])
        samples.append(Sample(tokens=tokens, prompt_length=len(prompt), turn=turn))
        history = np.concatenate([prompt, response])
    return samples


def direct(groups: list[list[Sample]], mode: str, seq_len: int, window: int) -> int:
    """Builds and packs all conversations; returns the number of rows."""
    found, count = [], 0
    for samples in groups:
        found += layouts.layouts_of(samples, mode, seq_len)[0]
        if len(found) >= window:
            count += len(packing.pack(found, seq_len))
            found = []
    return count + len(packing.pack(found, seq_len))


def through_grain(groups: list[list[Sample]], mode: str, seq_len: int, window: int) -> int:
    """The same through the dataset that training reads."""

    def build(samples: list[Sample]) -> packing.Group:
        found, report = layouts.layouts_of(samples, mode, seq_len)
        return packing.Group(found, report.counts())

    source = grain.MapDataset.source(groups).map(build)
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return sum(1 for _ in packing.PackedRows(source.to_iter_dataset(read), seq_len, window))


def fastest(build: Callable[[], int]) -> tuple[int, float, float]:
    """The result of `build`, and its best wall and processor seconds of three."""
    wall, processor = [], []
    for _ in range(3):
        start, used = time.perf_counter(), time.process_time()
        count = build()
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return count, min(wall), min(processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq_len", type=int, default=8192)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--mode", default="tree")
    args = parser.parse_args()
    for name, shape in SHAPES.items():
        rng = np.random.default_rng(0)
        groups, total = [], 0
        while total < args.tokens:
            groups.append(conversation(rng, *shape))
            total += sum(len(sample.tokens) for sample in groups[-1])
        given = (groups, args.mode, args.seq_len, args.window)
        count, wall, processor = fastest(functools.partial(direct, *given))
        in_grain = fastest(functools.partial(through_grain, *given))[2]
        result = {
            "shape": name,
            "mode": args.mode,
            "n_pass_tokens": total,
            "rows": count,
            "tokens_per_s": int(total / wall),
            "per_cpu_s": int(total / processor),
            "grain_per_cpu_s": int(total / in_grain),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
