# SPDX-License-Identifier: Apache-2.0
"""The commands that decode with a CP head: what they print, and their one line on bad input."""

import json

import pytest

from tests import commands
from tests.experiments.test_cp_heads_train import TINY

HEAD = ("--config.head.predicted=3", "--config.head.rank=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with a model and its head."""
    path = tmp_path_factory.mktemp("cp_decode") / "run"
    commands.run("cp_heads.train", *TINY, *HEAD, f"--workdir={path}")
    return path


def test_verify_keeps_its_contract(run):
    result, _ = commands.run("cp_heads.verify", *TINY, f"--checkpoint={run}", "--tokens=300")
    assert list(result) == [
        "loss_error",
        "grad_error",
        "law_error",
        "greedy_mismatches",
        "tokens_checked",
    ]
    assert result["greedy_mismatches"] == 0
    assert result["tokens_checked"] >= 300
    assert result["law_error"] < 1e-6


def test_generate_writes_the_same_with_heads_and_without(run):
    result, _ = commands.run(
        "cp_heads.generate",
        f"--checkpoint={run}",
        "--prompt=one",
        "--max_new_tokens=20",
        "--chains=2",
    )
    assert result["identical"] is True
    assert result["text"] == result["without"]["text"]
    assert result["tokens_per_call"] >= 1
    assert len(result["acceptance"]) == 2
    flags = (f"--checkpoint={run}", "--prompt=one", "--max_new_tokens=20")
    heads, _ = commands.run("generate", *flags, "--method=cp_heads", "--nochat")
    assert heads["text"] == result["text"]
    assert heads.keys() == {"text", "tokens", "stopped", "seconds", "tokens_per_s"}


def test_benchmark_keeps_its_contract(run, tmp_path):
    result, _ = commands.run(
        "cp_heads.benchmark",
        *TINY,
        f"--checkpoint={run}",
        "--baseline_steps=1",
        "--new_tokens=6",
        "--groups=1",
        "--repeats=1",
        f"--workdir={tmp_path / 'out'}",
        "--chip_price=2",
        "--require=speedup>0",
    )
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["autoregressive", "cp r2 n3", "rank1", "hydra"]
    for row in rows.values():
        assert {"tokens_per_s", "tokens_per_call", "draft_ms", "verify_ms"} <= row.keys()
        assert row["tokens"] == 5
    assert result["best"] == "cp r2 n3"
    best = rows[result["best"]]["tokens_per_s"]
    assert result["speedup"] == pytest.approx(best / rows["autoregressive"]["tokens_per_s"])
    assert result["over_rank1"] == pytest.approx(best / rows["rank1"]["tokens_per_s"])
    sizes = [rows[name]["drafter_parameters"] for name in ("cp r2 n3", "hydra")]
    assert 0.9 < sizes[1] / sizes[0] <= 1
    written = (tmp_path / "out" / "benchmark.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in written] == list(rows)


def test_wrong_input_is_one_line(run):
    flags = (f"--checkpoint={run}", "--prompt=one")
    line = commands.refusal("cp_heads.generate", *flags, "--temperature=-1")
    assert line.endswith("sampling.temperature=-1.0 must not be negative")
    line = commands.refusal("cp_heads.generate", *flags, "--chains=3")
    assert "3 draft chains: a head of rank 2 gives 1 to 2" in line
    line = commands.refusal("cp_heads.benchmark", *TINY, f"--checkpoint={run}", "--shapes=3b")
    assert line.endswith("--shapes: 3b not among 1b, 8b")
