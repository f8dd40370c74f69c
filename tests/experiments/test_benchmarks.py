# SPDX-License-Identifier: Apache-2.0
"""The benchmark commands on a machine without an accelerator: small, but whole."""

import csv
import json

from tests import commands

SMALL = ("--lengths=800", "--heads=2x1x8", "--repeats=3", "--seconds=0.05", "--dtype=float32")


def test_attention_beside_its_alternatives(tmp_path):
    result, err = commands.run(
        "benchmarks.attention",
        *SMALL,
        "--cases=one_pass,causal",
        "--contenders=xla,reference,triton,jax_cudnn,jax_triton",
        f"--out={tmp_path}",
    )
    measured = [row for row in result["rows"] if "tflops" in row]
    refused = [row for row in result["rows"] if "refused" in row]
    names = {(row["case"], row["pass"], row["implementation"]) for row in measured}
    assert len(names) == len(measured) == 2 * 2 * 2
    assert {row["implementation"] for row in refused} == {"triton", "jax_cudnn", "jax_triton"}
    assert len(refused) == 2 * 2 * 3
    for row in measured:
        assert row["difference"] < 1e-5
        assert row["ms_p25"] <= row["ms"] <= row["ms_p75"]
        flops = 4 * 2 * 8 * row["pairs"] * (1 if row["pass"] == "forward" else 3.5)
        assert abs(row["tflops"] * row["ms"] * 1e9 - flops) < 1e-6 * flops
        if row["pass"] == "forward":
            assert row["implementation"] == "reference" or row["lists_share"] > 0
    assert result["ratios"] == {}  # no alternative runs here
    assert "jax_triton on one_pass: plain causal attention only" in err
    lines = (tmp_path / "attention.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result["rows"]
    with (tmp_path / "attention.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"])
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {f"attention_2x1x8_{name}.png" for name in ("forward", "forward_backward")}


def test_attention_refuses_names_that_do_not_exist():
    line = commands.refusal("benchmarks.attention", "--cases=one_pas")
    assert "mask 'one_pas' is not one of one_pass, documents" in line
    line = commands.refusal("benchmarks.attention", "--lengths=8k")
    assert "--lengths=8k are not numbers" in line


def test_tuning_says_why_a_kernel_does_not_run_here():
    line = commands.refusal(
        "benchmarks.tune_attention", "--implementation=mosaic_gpu", "--length=256"
    )
    assert "mosaic_gpu: runs on Hopper GPUs" in line


def test_lookup_beside_its_alternatives(tmp_path):
    result, _ = commands.run(
        "benchmarks.lookup",
        *("--tokens=4096", "--vocab=16", "--dim=8", "--repeats=3", "--seconds=0.05"),
        f"--out={tmp_path}",
    )
    rows = {row["implementation"]: row for row in result["rows"]}
    assert rows.keys() == result["ratios"].keys() == {"float32", "indexing", "one_hot", "sorted"}
    for name, row in rows.items():
        assert row["ms_p25"] <= row["ms"] <= row["ms_p75"]
        assert (row["relative_error"] > 0.1) == (
            name == "indexing"
        )  # sums of bfloat16 stop growing
    assert len((tmp_path / "lookup.jsonl").read_text().splitlines()) == 4
    line = commands.refusal("benchmarks.lookup", "--contenders=sum")
    assert "contender 'sum' is not one of float32, indexing" in line
