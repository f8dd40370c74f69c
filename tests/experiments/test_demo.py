# SPDX-License-Identifier: Apache-2.0
"""The demos: which there are, and that the whole of one ends with a table that means something."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from lm import report, report_rows


def command(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device
    return subprocess.run(
        [sys.executable, "-m", "experiments.demo", *arguments],
        capture_output=True,
        encoding="utf-8",
        env=environment | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )


def test_an_unknown_demo_is_one_clear_line(tmp_path):
    got = command("--only=nonsense", f"--workdir={tmp_path}/demo")
    assert got.returncode == 2
    (line,) = got.stderr.splitlines()
    assert "nonsense" in line
    names = {"single_pass", "cp_heads", "token_select", "draft_inference", "async_decoding"}
    assert names <= set(line.replace(",", " ").split())
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_single_pass_demo(tmp_path):
    folder = tmp_path / "demo"
    got = command("--only=single_pass", f"--workdir={folder}")
    assert got.returncode == 0, got.stderr
    *lines, last = got.stdout.splitlines()
    result = json.loads(last)
    page = pathlib.Path(result["report"]).read_text()
    assert page.startswith("<!doctype html>")
    rows = {row["mode"]: row for row in result["demos"]["single_pass"]["rows"]}
    assert set(rows) == {"tree", "n_pass"}
    for row in rows.values():
        assert row["exact_match"] > 0.8
        assert row["n"] > 150
    run = report_rows.gather([folder / "single_pass"])[0]
    measured = report.compared(run)
    assert measured["n_pass"]["tokens"] > 1.8 * measured["tree"]["tokens"]
    assert measured["tree"]["conversations_per_s"] > 1.2 * measured["n_pass"]["conversations_per_s"]
    assert "no difference beyond chance" in report.verdict(measured)[0]
    table = {line.split("  ")[0]: line for line in lines}
    for quantity in ("tokens through the model", "attention pairs", "model FLOPs", "exact match"):
        assert quantity in table

    # again: it goes on from what is there, and says the same
    began = time.monotonic()
    again = command("--only=single_pass", f"--workdir={folder}")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("already trained") == 2
    assert time.monotonic() - began < result["demos"]["single_pass"]["seconds"]
    repeated = json.loads(again.stdout.splitlines()[-1])["demos"]["single_pass"]["rows"]
    assert [row["exact_match"] for row in repeated] == [row["exact_match"] for row in rows.values()]


@pytest.mark.slow
def test_cp_heads_demo(tmp_path):
    got = command("--only=cp_heads", f"--workdir={tmp_path}/demo")
    assert got.returncode == 0, got.stderr
    *lines, last = got.stdout.splitlines()
    result = json.loads(last)
    page = pathlib.Path(result["report"]).read_text()
    assert "single_pass" not in page
    rows = {row["method"]: row for row in result["demos"]["cp_heads"]["rows"]}
    first, cp, hmm = rows.values()
    assert (first["rank"], cp["transition"], hmm["transition"]) == (1, "identity", "linear")
    for row in (cp, hmm):
        assert row["rank"] == 4
        assert row["expected_tokens_per_call"] > first["expected_tokens_per_call"] + 0.2
    best = max(rows.values(), key=lambda row: row["expected_tokens_per_call"])
    assert abs(best["tokens_per_call"] - best["expected_tokens_per_call"]) < 0.5
    assert any(line.startswith(best["method"]) for line in lines)
    assert (tmp_path / "demo/cp_heads/plots/acceptance_greedy_by_rank.png").is_file()


@pytest.mark.slow
def test_token_select_demo(tmp_path):
    got = command("--only=token_select", f"--workdir={tmp_path}/demo")
    assert got.returncode == 0, got.stderr
    *lines, last = got.stdout.splitlines()
    result = json.loads(last)
    page = pathlib.Path(result["report"]).read_text()
    assert "Answers from long contexts" in page
    assert "single_pass" not in page
    rows = result["demos"]["token_select"]["rows"]
    assert {row["method"] for row in rows} == {"dense", "token_select", "snapkv"}
    found = {(row["method"], row["task"]): row for row in rows}
    for task in ("passkey", "number_string"):
        dense, selected = found["dense", task], found["token_select", task]
        assert dense["accuracy"] >= 0.8
        assert selected["accuracy"] >= 0.95 * dense["accuracy"]
        assert selected["tokens_read"] < 0.25 * dense["tokens_read"]
    assert any(line.startswith("token_select") for line in lines)
    assert (tmp_path / "demo/token_select/plots/accuracy_by_task.png").is_file()


@pytest.mark.slow
def test_draft_inference_demo(tmp_path):
    got = command("--only=draft_inference", f"--workdir={tmp_path}/demo")
    assert got.returncode == 0, got.stderr
    *lines, last = got.stdout.splitlines()
    result = json.loads(last)
    page = pathlib.Path(result["report"]).read_text()
    for shown in ("Answers from long contexts", "How good the draft is", "target", "draft"):
        assert shown in page
    assert "single_pass" not in page
    made = result["demos"]["draft_inference"]
    assert {row["method"] for row in made["rows"]} == {"speckv", "dense", "snapkv"}
    verdicts = {row["against"]: row["verdict"] for row in made["comparisons"]}
    assert verdicts["snapkv"] == "above"
    assert all(row["agreement"] > 0.8 for row in made["draft"])
    assert any(line.startswith("Accuracy of speckv minus snapkv") for line in lines)
    assert (tmp_path / "demo/draft_inference/plots/accuracy_by_task.png").is_file()


@pytest.mark.slow
def test_async_decoding_demo(tmp_path):
    got = command("--only=async_decoding", f"--workdir={tmp_path}/demo")
    assert got.returncode == 0, got.stderr
    *lines, last = got.stdout.splitlines()
    result = json.loads(last)
    assert "Answers in threads" in pathlib.Path(result["report"]).read_text()
    sequential, threaded = result["demos"]["async_decoding"]["rows"]
    assert (sequential["method"], threaded["method"]) == ("sequential", "async predicted")
    assert sequential["quality"] >= 0.85
    assert threaded["quality"] >= 0.8
    assert threaded["speedup_critical_path"] >= 1.2
    assert threaded["finished"] >= 0.98
    assert any(line.startswith("async predicted") for line in lines)
    assert (tmp_path / "demo/async_decoding/plots/timeline_async_predicted.png").is_file()
