# SPDX-License-Identifier: Apache-2.0
"""What is timed is the program that was given."""

import dataclasses
import functools

import numpy as np
import pytest

from lm.async_decoding import (
    benchmark,
    critical_path,
    figures,
    simulate,
)
from lm.async_decoding.benchmark import Options, Work
from lm.errors import UserError
from tests.lm.async_decoding.composed_programs import END, PROMPT, SPEAKER, TOKENIZER


def programs(count):
    rng = np.random.default_rng(3)
    made = [simulate.random_answer(rng, TOKENIZER, END, size=4, blocks=3) for _ in range(count)]
    return [dataclasses.replace(one, prompt=PROMPT[: 20 - i]) for i, one in enumerate(made)]


@functools.cache
def rows():
    works = [Work(one, 30 + i) for i, one in enumerate(programs(5))]
    options = Options(batches=(2,), threads=(12,), repeats=2)
    return list(benchmark.benchmark(SPEAKER, works, options))


def test_steps_are_those_of_the_programs():
    times = [critical_path.timeline(one).steps for one in programs(4)]  # the fifth has no partner
    sequential, threaded = rows()
    assert sequential["steps"] == 32  # of 31 and 33 tokens
    longest = [max(times[:2]), max(times[2:])]
    assert threaded["answers"] == 4
    assert threaded["steps"] == np.mean(longest)
    path = critical_path.geometric_mean([31 / longest[0], 33 / longest[1]])
    assert threaded["critical_path_speedup"] == pytest.approx(path)


def test_rows_hold_what_they_promise():
    assert [row["method"] for row in rows()] == ["sequential", "async"]
    for row in rows():
        assert row["realised"] == row["wall_speedup"] / row["critical_path_speedup"]
        assert 0 < row["step_ms_p50"] <= row["step_ms_p95"]
        assert min(row[n] for n in ("tokens_per_s", "prefill_ms", "peak_bytes")) > 0
        if row["method"] == "sequential":
            assert row["wall_speedup"] == row["critical_path_speedup"] == 1
    assert set(figures.draw(rows())) == {"benchmark"}


def test_prompts_grow_in_front():
    work = Work(programs(1)[0], 9)
    (longer,) = benchmark.lengthened([work], 50, 256, 0)
    assert len(longer.program.prompt) == 50
    assert longer.program.prompt[-20:].tolist() == PROMPT.tolist()
    (same,) = benchmark.lengthened([work], 7, 256, 0)
    assert same.program.prompt.tolist() == PROMPT.tolist()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"compose": ("evict:snapkv",)}, "none, evict:METHOD:TOKENS"),
        ({"compose": ("evict:adakv:8",)}, "heads keep unequal numbers"),
        ({"compose": ("evict:snapkv:x",)}, "'x' is no number of tokens"),
        ({"compose": ("spec_kv",)}, "none, evict:METHOD:TOKENS, spec_kv:TOKENS"),
        ({"compose": ("none:8",)}, "none, evict"),
        ({"compose": ()}, "METHOD one of snapkv, streaming_llm"),
        ({"batches": (0,)}, "--batches"),
        ({"scheme": "oracle"}, "cannot be decoded"),
    ],
)
def test_what_cannot_be_timed_is_refused(change, reason):
    with pytest.raises(UserError, match=reason):
        Options(**change)


def test_what_does_not_fit_is_refused():
    works = [Work(one, 30) for one in programs(2)]
    for change, reason in (
        ({"batches": (4,)}, "2 answers for a batch of 4"),
        ({"compose": ("evict:knorm:20",)}, "the shortest prompt has 19 tokens"),
        ({"compose": ("spec_kv:8",)}, "no draft model was named"),
        ({"compose": ("cp_heads",)}, "no head was named"),
    ):
        with pytest.raises(UserError, match=reason):
            next(benchmark.benchmark(SPEAKER, works, Options(**{"batches": (1,)} | change)))
