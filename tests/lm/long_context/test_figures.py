# SPDX-License-Identifier: Apache-2.0
"""Figures are made from rows alone: which ones, and what their lines hold."""

import json
import math

import pytest

from lm.errors import UserError
from lm.long_context import figures
from lm.plots import interval


def answered(task, method, budget, accuracy, length=256):
    row = {"kind": "long_context", "task": task, "length": length, "method": method}
    return row | {"budget": budget, "accuracy": accuracy, "samples": 50, "seed": 0}


def timed(method, context, ms):
    row = {"kind": "decode", "method": method, "context": context, "batch": 1}
    return row | {"tpot_ms_p50": ms, "ttft_ms": None if ms is None else 10 * ms}


ANSWERS = [
    answered("a", "dense", 256, 1.0),
    answered("b", "dense", 256, 0.8),
    *(answered(task, "token_select", n, n / 256) for task in "ab" for n in (32, 64)),
    answered("a", "snapkv", 32, 0.5),
    answered("b", "snapkv", 32, 0.3),
    answered("a", "snapkv", 64, 0.9),  # not yet measured on b
]
STAGES = [
    {"kind": "stage", "stage": "copy", "ms": 1.0, "by": "xla"},
    {"kind": "stage", "stage": "step", "mode": "decode", "tokens": 512, "ms": 2.0, "by": "xla"},
    {"kind": "stage", "stage": "rest", "mode": "decode", "tokens": 8, "ms": 3.0},
]
SPEEDS = [timed("dense", 512, 1.0), timed("dense", 1024, 2.0), timed("token_select", 512, 1.5)]
BROKEN = timed("token_select", 1024, None)


def test_lines_hold_the_rows():
    lines = figures.accuracy_by_budget(ANSWERS)
    assert lines.keys() == {"token_select", "snapkv"}
    assert [point[:2] for point in lines["token_select"]] == [(32, 0.125), (64, 0.25)]
    ((budget, mean, reach),) = lines["snapkv"]
    low, high = interval(0.4, 100)
    assert (budget, mean, reach) == pytest.approx((32, 0.4, (high - low) / 2))
    bars = figures.accuracy_by_task(ANSWERS)
    shown = {(bar["implementation"], bar["case"]): bar["tflops"] for bar in bars}
    assert shown["snapkv", "a"] == 0.5
    assert shown["token_select", "b"] == 0.125
    assert len(shown) == 6
    (stage,) = figures.stages(STAGES)
    assert (stage["case"], stage["length"], stage["tflops"]) == ("step", 512, 2.0)
    lines = figures.by_context([*SPEEDS, BROKEN], "tpot_ms_p50")
    assert [x[:2] for x in lines["dense"]] == [(512, 1.0), (1024, 2.0)]
    assert lines["token_select"][0][:2] == (512, 1.5)
    assert math.isnan(lines["token_select"][0][2])
    assert len(lines["token_select"]) == 1


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (ANSWERS, {"accuracy_by_budget_256", "accuracy_by_task"}),
        (STAGES, {"stages_decode"}),
        (SPEEDS, {"latency", "first_token"}),
    ],
)
def test_every_kind_of_rows_has_its_figures(tmp_path, rows, names):
    assert figures.draw(rows).keys() == names
    paths = figures.save(figures.draw(rows), tmp_path / "plots")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{n}.png" for n in names}
    assert len(paths) == len(names)


def test_drafts_of_one_checkpoint_are_told_apart():
    rows = [
        answered("a", "speckv", 32, accuracy) | {"draft": f"runs/{draft}", "checkpoint": target}
        for target, draft, accuracy in (("t", "x", 0.5), ("t", "y", 1.0))
    ]
    assert [row["method"] for row in figures._by_draft(rows)] == ["speckv x", "speckv y"]
    pairs = [rows[0], rows[1] | {"checkpoint": "u"}]  # a pair each: to be averaged
    assert {row["method"] for row in figures._by_draft(pairs)} == {"speckv"}


def test_gather_takes_the_last_of_a_setting(tmp_path):
    repeated = answered("a", "token_select", 32, 0.75)
    lines = [json.dumps(row) for row in (*ANSWERS, repeated)]
    (tmp_path / "eval.jsonl").write_text("\n".join(lines))
    rows = figures.gather([tmp_path])
    assert len(rows) == len(ANSWERS)
    assert repeated in rows
    assert figures.gather([tmp_path / "eval.jsonl"]) == rows
    apart = [row | {"questions": "agnostic", "draft": "x"} for row in ANSWERS]
    aware = [row | {"questions": "aware"} for row in ANSWERS]
    lines = [json.dumps(row) for row in (*aware, *apart)]
    (tmp_path / "eval.jsonl").write_text("\n".join(lines))
    assert len(figures.gather([tmp_path])) == 2 * len(ANSWERS)
    kinds = {"accuracy_by_budget_256", "accuracy_by_task"}
    both = kinds | {f"{name}_agnostic" for name in kinds}
    assert figures.draw([*aware, *apart]).keys() == both
    (tmp_path / "eval.jsonl").write_text("")
    with pytest.raises(UserError, match="no row to draw"):
        figures.gather([tmp_path])
    with pytest.raises(UserError, match="no such workdir"):
        figures.gather([tmp_path / "none"])
