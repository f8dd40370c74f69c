# SPDX-License-Identifier: Apache-2.0
"""Draft inference as a user runs it, on one tiny pair: last lines, what is kept, and refusals."""

import json

import pytest

from tests import commands

SHAPE = ("num_layers=1", "embed_dim=32", "head_dim=8", "mlp_dim=48")
OTHER = "--draft_config=configs/draft_inference.py:smoke_draft"
TARGET = ("--config=configs/draft_inference.py:smoke", *(f"--config.model.{x}" for x in SHAPE))
DRAFT = (OTHER, *(f"--draft_config.model.{x}" for x in SHAPE), "--draft_config.model.embed_dim=16")
ROW = {"method", "budget", "task", "length", "accuracy", "ci95"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The flags of a trained pair."""
    path = tmp_path_factory.mktemp("draft_inference") / "pair"
    steps = (
        f"--{flag}.{key}"
        for flag in ("config", "draft_config")
        for key in ("train.steps=1", "data.seq_len=512", "train.batch_size=1")
    )
    result, _ = commands.run("draft_inference.train", *TARGET, *DRAFT, *steps, f"--workdir={path}")
    assert result.keys() == {"target", "draft"}
    for stage, found in result.items():
        assert found.keys() == {"workdir", "step", "loss", "params_sha256"}
        assert found["step"] == 1
        assert found["workdir"] == str(path / stage)
    assert result["target"]["params_sha256"] != result["draft"]["params_sha256"]
    return f"--target={path}/target", f"--draft={path}/draft"


def test_evaluate_keeps_what_is_finished(pair, tmp_path):
    asked = (
        *(*TARGET, *pair, f"--workdir={tmp_path}", "--tasks=passkey", "--lengths=384"),
        *("--samples=2", "--seeds=0,1", "--methods=speckv,snapkv", "--budgets=64"),
    )
    result, _ = commands.run("draft_inference.evaluate", *asked)
    rows = result["rows"]
    assert [row["method"] for row in rows] == ["speckv"] * 2 + ["dense"] * 2 + ["snapkv"] * 2
    assert all(row.keys() >= ROW for row in rows)
    assert [row["seed"] for row in rows[:2]] == [0, 1]
    assert [row["budget"] for row in rows[::2]] == [64, 384, 64]
    against = [(row["method"], row["against"]) for row in result["comparisons"]]
    assert against == [("speckv", "dense"), ("speckv", "snapkv")]
    assert {row["verdict"] for row in result["comparisons"]} == {"no task"}  # nothing is learnt
    for row in result["draft"]:
        assert 0 <= row["overlap"] <= 1
        assert -1 <= row["rank_correlation"] <= 1
        assert 64 / 384 < row["chance"] < 64 / 256  # two random choices
    before = (tmp_path / "answers.jsonl").read_text()
    again, err = commands.run("draft_inference.evaluate", *asked)
    assert (again["rows"], again["draft"]) == (rows, result["draft"])
    assert (tmp_path / "answers.jsonl").read_text() == before
    assert "passkey 384" not in err  # no cell was measured
    page, _ = commands.run("report", f"--workdir={tmp_path}")
    with open(page["report"], encoding="utf-8") as file:
        html = file.read()
    for shown in ("How good the draft is", "Methods against each other", "snapkv"):
        assert shown in html


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    """Workdir of a model with a CP head."""
    path = tmp_path_factory.mktemp("draft_inference") / "headed"
    flags = (
        *(f"--config.model.{x}" for x in SHAPE),
        *("--config.data.source=arithmetic", "--config.data.limit=8", "--config.data.seq_len=64"),
        *(
            "--config.head.predicted=3",
            "--config.head.rank=2",
            "--config.data.eval_conversations=2",
        ),
        *("--config.train.steps=1", "--config.train.batch_size=1"),
    )
    smoke = "--config=configs/cp_heads.py:smoke"
    commands.run("cp_heads.train", smoke, *flags, f"--workdir={path}")
    return path


def test_a_target_drafts_by_its_own_heads(headed, tmp_path):
    own = (f"--target={headed}", f"--heads={headed}")
    result, err = commands.run(
        "draft_inference.evaluate",
        *(TARGET[0], *own, f"--workdir={tmp_path}", "--tasks=passkey", "--lengths=384"),
        *("--samples=1", "--budgets=64", "--methods=speckv"),
    )
    assert [row["method"] for row in result["rows"]] == ["speckv", "dense"]
    (row,) = result["draft"]
    assert row["draft"] == f"heads:{headed}"
    assert row["overlap"] is row["rank_correlation"] is None
    assert 0 <= row["agreement"] <= 1
    assert "other weights" not in err
    reads = [row["tokens_read"] for row in result["rows"]]
    assert reads[0] < 100 < reads[1]
    asked = ("draft_inference.generate", TARGET[0], *own, f"--prompt={'one by one, ' * 9}")
    written, _ = commands.run(*asked, "--budget=40", "--max_new_tokens=4", "--nochat", "--nodense")
    assert written["tokens_kept"] == 40
    timed, _ = commands.run(
        "draft_inference.benchmark",
        *(TARGET[0], *own, "--contexts=150", "--new_tokens=2", "--repeats=1"),
    )
    rows = {row["method"]: row for row in timed["rows"]}
    assert list(rows) == ["speckv", "dense", "snapkv"]
    assert {row["draft"] for row in rows.values()} == {f"heads:{headed}"}
    assert 0 < rows["speckv"]["draft_ms"] < rows["speckv"]["ttft_ms"]
    # one layer, a list of 64 + 34 slots in a room of 128, 2 KV heads of 8, keys and values
    assert rows["speckv"]["draft_bytes"] > 2 * 128 * 2 * 8 * 4
    reason = commands.refusal(*asked, "--method=specpc")
    assert "specpc chooses by a draft's attention, and heads only propose tokens" in reason
    assert "--heads: snapkv takes no draft" in commands.refusal(*asked, "--method=snapkv")


@pytest.mark.slow
def test_a_file_of_longbench_asked_after_the_fact(pair, tmp_path):
    record = {"context": "So it was, " * 9, "input": "Was it?", "answers": ["so it was"]}
    lines = [record | {"dataset": name} for name in ("multifieldqa_en", "lcc")]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result, _ = commands.run(
        "draft_inference.evaluate",
        *(*TARGET, *pair, f"--workdir={tmp_path}", f"--data={file}", "--questions=agnostic"),
        *("--methods=speckv", "--budgets=48", "--notimed", "--require=agreement>=0"),
    )
    rows = result["rows"]
    assert {(row["task"], row["questions"]) for row in rows} == {
        ("multifieldqa_en", "agnostic"),
        ("lcc", "agnostic"),
    }
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    reads = {row["method"]: row["tokens_read"] for row in rows if row["task"] == "lcc"}
    assert reads["speckv"] < reads["dense"]


def test_benchmark_of_random_models(tmp_path):
    result, _ = commands.run(
        "draft_inference.benchmark",
        *(*TARGET, *DRAFT, "--contexts=150", "--batch_sizes=2", "--new_tokens=2", "--repeats=1"),
        *("--methods=speckv,dense", "--chip_price=3.6", f"--workdir={tmp_path}"),
    )
    mine, dense = result["rows"]
    names = ("ttft_ms", "total_ms", "decode_tokens_per_s", "requests_per_s", "peak_bytes")
    for row in (mine, dense):
        assert min(row[name] for name in names) > 0
        assert row["context"] == 150
        wanted = row["ttft_ms"] + 1e3 * 4 / row["decode_tokens_per_s"]
        assert row["total_ms"] == pytest.approx(wanted)
        assert row["requests_per_s"] == pytest.approx(2e3 / wanted)
        assert row["cost_per_1000_requests"] == pytest.approx(1 / row["requests_per_s"])
    assert dense["agreement"] == 1
    assert dense["draft_ms"] is dense["draft_bytes"] is None
    assert 0 <= mine["agreement"] <= 1
    assert 0 < mine["draft_ms"] < mine["ttft_ms"]
    # one layer of 2 sequences in a bucket of 192 slots, 2 KV heads of 8, keys and values
    layer = 2 * 2 * 192 * 2 * 8 * 4
    assert mine["prefill_cache_bytes"] == mine["cache_bytes"] + layer
    assert mine["cache_bytes"] < dense["cache_bytes"] == dense["prefill_cache_bytes"]
    assert mine["draft_bytes"] > layer
    assert result["total"] == pytest.approx(dense["total_ms"] / mine["total_ms"])
    kept = [json.loads(line) for line in (tmp_path / "benchmark.jsonl").read_text().splitlines()]
    assert kept == result["rows"]


@pytest.mark.slow
def test_adapt_then_tune_and_explain(pair, tmp_path):
    """A draft distilled on a file of prompts is one to choose from, and its choice is explained."""
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"prompt": "word by word, " * 12}) + "\n")
    target, _ = pair
    adapted, _ = commands.run(
        "draft_inference.adapt",
        *(*TARGET, *pair, f"--prompts={file}", f"--workdir={tmp_path}/adapted"),
        *("--max_new_tokens=3", "--config.train.steps=2", "--config.train.batch_size=1"),
        "--config.optimizer.warmup_steps=0",
    )
    assert adapted["step"] == 2
    assert 0 < adapted["kl_after"] < adapted["kl_before"]
    data = (target, f"--data={file}", "--max_new_tokens=3")
    tuned, _ = commands.run(
        "draft_inference.tune",
        *(*TARGET, *data, f"--drafts={tmp_path}/adapted", f"--workdir={tmp_path}/tuned"),
        *("--budgets=168", "--windows=16", "--target_agreement=1"),
    )
    chosen = tuned["chosen"]
    assert (chosen["path"], chosen["budget"]) == (f"{tmp_path}/adapted", 168)
    assert chosen["agreement"] == 1  # everything is kept
    result, _ = commands.run(
        "draft_inference.evaluate",
        *(*TARGET, *data, f"--tuned={tmp_path}/tuned", "--methods=speckv", "--notimed"),
        f"--workdir={tmp_path}/rows",
    )
    assert [row["budget"] for row in result["rows"]] == [168, 171]
    asked = (
        *("draft_inference.generate", *TARGET, target, f"--draft={tmp_path}/adapted"),
        *(f"--prompt={'word by word, ' * 12}", "--budget=40", "--max_new_tokens=3", "--nochat"),
    )
    written, _ = commands.run(*asked)
    assert written["tokens_kept"] == 40
    assert 0 <= written["dense"]["agreement"] <= 1
    again, _ = commands.run(*asked, "--speculate=2", "--nodense")
    assert again["text"] == written["text"]
    assert 1 <= again["speculation"]["passes"] <= 3
    explained, _ = commands.run(
        "draft_inference.explain",
        *(*TARGET, target, f"--draft={tmp_path}/adapted", f"--prompts={file}"),
        *(f"--out={tmp_path}/why", "--budget=40", "--max_new_tokens=3"),
    )
    rows = [json.loads(x) for x in (tmp_path / "why/dropped.jsonl").read_text().splitlines()]
    assert explained["rows"] == len(rows)
    for row in rows:
        assert len(row["kept"]) == len(row["kept_scores"]) == 40
        assert sorted(row["kept"] + row["dropped"]) == list(range(168))
        # beside the window, what was dropped has no better score than what was kept
        kept = [x for x, slot in zip(row["kept_scores"], row["kept"], strict=True) if slot < 151]
        dropped = zip(row["dropped_scores"], row["dropped"], strict=True)
        assert min(kept) >= max(x for x, slot in dropped if slot < 151)
    page = (tmp_path / "why/report.html").read_text()
    assert "<mark" in page
    assert page.count("data:image/png") == 1


def test_plot(tmp_path):
    about = {"kind": "request", "batch": 1, "peak_bytes": 9, "ttft_ms": 1.0, "total_ms": 3.0}
    lines = [about | {"method": "speckv", "context": n} for n in (64, 128)]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result, _ = commands.run("draft_inference.plot", f"--rows={file}", f"--out={tmp_path}/plots")
    names = {path.rsplit("/")[-1] for path in result["plots"]}
    assert names == {"first_token.png", "request.png", "memory.png"}


@pytest.mark.parametrize(
    ("command", "flags", "reason"),
    [
        ("train", ("--workdir=none",), "--draft_config says what the draft is"),
        (
            "train",
            ("--workdir=none", OTHER, "--draft_config.data.seed=1"),
            "data.seed is 0 for the target and 1 for the draft",
        ),
        ("evaluate", (), "which target?"),
        ("evaluate", ("--target=none",), "none: no readable config.json"),
        ("evaluate", ("--target=none", "--draft=a", "--heads=b"), "--draft and --heads both name"),
        ("benchmark", (OTHER, "--draft=none"), "each name a draft: pass one"),
        ("benchmark", (OTHER, "--heads=none"), "each name a draft: pass one"),
        ("benchmark", ("--heads=none",), "--heads are of a checkpoint"),
        ("benchmark", (), "speckv needs a draft"),
    ],
)
def test_refusals(command, flags, reason):
    line = commands.refusal(f"draft_inference.{command}", *TARGET, *flags)
    assert reason in line
