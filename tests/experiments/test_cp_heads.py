# SPDX-License-Identifier: Apache-2.0
"""The commands of CP heads on one small run: what they print, and their one line on bad input."""

import json
import pathlib
import shutil

import pytest

from tests import commands

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "hf"
SMOKE = "--config=configs/cp_heads.py:smoke"
TINY = (
    SMOKE,
    *(flag for flag in commands.TINY if "seq_len" not in flag),
    "--config.data.seq_len=64",
    "--config.data.source=arithmetic",
    "--config.data.limit=20",
    "--config.head.predicted=3",
    "--config.head.rank=2",
    "--config.train.steps=2",
    "--config.train.log_every=1",
)
SHORT = ("--config.sampling.max_new_tokens=12", "--prompt_tokens=16", "--texts=corpus")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir with a model and its head, what training printed)."""
    path = tmp_path_factory.mktemp("cp_heads") / "run"
    return path, commands.run("cp_heads.train", *TINY, f"--workdir={path}")[0]


@pytest.fixture(scope="module")
def run(trained):
    return trained[0]


def test_training_keeps_its_contract(trained):
    run, result = trained
    assert result.keys() == {"step", "loss", "params_sha256"}
    assert result["step"] == 2
    assert "gate_effective" in (run / "metrics.jsonl").read_text()


def test_attaching_keeps_its_contract(tmp_path):
    base = shutil.copytree(GOLDEN / "qwen3", tmp_path / "qwen3")
    out = tmp_path / "head"
    result, _ = commands.run("cp_heads.attach", SMOKE, f"--hf_dir={base}", f"--out={out}")
    assert result.keys() == {"head", "rank", "predicted", "parameters", "trained"}
    assert sorted(path.name for path in out.iterdir()) == ["cp_head.json", "cp_head.safetensors"]
    assert sorted(p.name for p in base.iterdir()) == sorted(
        p.name for p in (GOLDEN / "qwen3").iterdir()
    )


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


def test_evaluate_and_plot_keep_their_contracts(run):
    flags = (*TINY, *SHORT, f"--checkpoint={run}", "--temperatures=0,1")
    result, _ = commands.run("cp_heads.evaluate", *flags, "--require=expected_tokens_per_call>=1")
    for row in result["rows"]:
        assert {"rank", "transition", "n", "expected_tokens_per_call"} <= row.keys()
        assert (row["rank"], row["transition"]) == (2, "identity")
        assert 1 <= row["expected_tokens_per_call"] <= row["n"]
    found = [(row["temperature"], row["n"]) for row in result["rows"]]
    assert found == [(0, 2), (0, 3), (1, 2), (1, 3)]
    plotted, _ = commands.run("cp_heads.plot", f"--workdir={run}")
    names = [pathlib.Path(path).name for path in plotted["plots"]]
    assert names == ["acceptance_greedy_by_rank.png", "acceptance_t1_by_rank.png"]


@pytest.fixture(scope="module")
def tuned(run):
    """(workdir of tune, what it printed)."""
    path = run.parent / "tuned"
    flags = (*TINY, *SHORT, f"--checkpoint={run}", f"--workdir={path}")
    return path, commands.run("cp_heads.tune", *flags, "--ranks=1", "--timed=1", "--sequences=1")[0]


def test_tune_trains_compares_and_keeps_a_choice(tuned):
    path, result = tuned
    assert (path / "heads" / "cp_r1_n3").is_dir()
    assert len(result["rows"]) == 2
    assert result["rows"][0]["method"] == "autoregressive"
    kept = json.loads((path / "tuned.json").read_text())
    assert kept["chosen"] == result["chosen"]
    assert set(result["chosen"]["hashes"]) == {"model", "tokenizer", "template"}


@pytest.mark.slow
def test_generate_follows_a_choice(run, tuned, tmp_path):
    """The choice of a head and of its length is read back; for another model it says so."""
    choice = json.loads((tuned[0] / "tuned.json").read_text())
    head = {"checkpoint": str(run), "rank": 2, "transition": "identity", "n": 2}
    choice["chosen"] |= head | {"hashes": choice["chosen"]["hashes"] | {"model": "another"}}
    (tmp_path / "tuned.json").write_text(json.dumps(choice))
    flags = (f"--tuned={tmp_path}", "--prompt=one", "--max_new_tokens=20", "--chains=2")
    result, err = commands.run("cp_heads.generate", *flags)
    assert "tuned for another model: tune again" in err
    assert len(result["acceptance"]) == 1
    assert result["identical"] is True
    assert result["text"] == result["without"]["text"]
    assert result["tokens_per_call"] >= 1
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


def test_a_study_keeps_its_contract(tmp_path):
    """Out of time before it began: what it prints, and that it ends well."""
    flags = (*TINY, "--config.head.expander_rank=4", f"--workdir={tmp_path}")
    result, err = commands.run("cp_heads.study", *flags, "--minutes=0.00001")
    assert result == {"stage": "trunk", "done": False, "rows": 0, "plots": [], "summary": {}}
    assert "plan: heads" in err


@pytest.mark.parametrize(
    ("command", "flags", "reason"),
    [
        ("train", (*TINY, "--workdir=/nowhere", "--config.head.rank=0"), "head.rank=0 must be at"),
        ("generate", ("--prompt=one",), "which head? give --checkpoint or --tuned"),
        ("benchmark", (*TINY, "--checkpoint=/nowhere", "--shapes=3b"), "3b not among 1b, 8b"),
        ("plot", ("--rows=/nowhere.jsonl",), "--rows alone needs --out, a folder for the figures"),
    ],
)
def test_wrong_input_is_one_line(command, flags, reason):
    assert reason in commands.refusal(f"cp_heads.{command}", *flags)


def test_the_implementation_of_a_config_is_taken(run):
    flags = (*TINY, *SHORT, f"--checkpoint={run}", "--config.train.implementation=triton")
    assert "triton: runs on CUDA GPUs" in commands.refusal("cp_heads.evaluate", *flags)
