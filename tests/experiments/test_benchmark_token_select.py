# SPDX-License-Identifier: Apache-2.0
"""The token selection benchmark on a machine without an accelerator: small, but whole."""

import csv
import json

from tests import commands

SMALL = ("--tokens=300", "--k=32", "--n_init=4", "--n_local=16", "--chunk=8", "--heads=4x2x8",
         "--dtype=float32", "--repeats=2", "--loop_seconds=0.0001", "--copied=1024")  # fmt: skip


def test_stages_of_a_step(tmp_path):
    result, err = commands.run(
        "benchmarks.token_select",
        *SMALL,
        "--modes=decode",
        "--shadow=int8",
        "--contenders=xla,published,dense,triton",
        f"--out={tmp_path}",
    )
    rows = result["rows"]
    timed = {(r["method"], r["shadow"], r["stage"]) for r in rows if "mode" in r and "ms" in r}
    ours = {"score", "vote", "importance", "top_k", "select", "step"}
    expected = {("xla", "int8", stage) for stage in ours} | {("dense", "", "full")}
    assert timed == expected | {("published", "", "score"), ("published", "", "select")}
    overlaps = {row["shadow"]: row["overlap"] for row in rows if "overlap" in row}
    assert overlaps[""] == 1
    assert overlaps["int8"] > 0.9
    assert {row["method"] for row in rows if "refused" in row} == {"triton"}
    assert "triton (decode, 300 tokens): triton: runs on CUDA GPUs" in err
    copy = rows[0]
    for row in rows:
        if "bandwidth_share" in row:
            rate = row["bytes"] / row["ms"] * 1e3
            assert abs(row["bandwidth_share"] * copy["bandwidth"] / rate - 1) < 1e-6
    lines = (tmp_path / "token_select.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    with (tmp_path / "token_select.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "token_select_decode.png").exists()


def test_refusals():
    line = commands.refusal("benchmarks.token_select", "--tokens=32k")
    assert "--tokens=32k are not numbers" in line
    line = commands.refusal("benchmarks.token_select", *SMALL, "--tune")
    assert "runs on CUDA GPUs" in line
