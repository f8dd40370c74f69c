# SPDX-License-Identifier: Apache-2.0
"""The commands that measure heads without a decoder, choose among them and draw them."""

import json
import pathlib

import pytest

from tests import commands
from tests.experiments.test_cp_heads_train import TINY

SHORT = ("--config.sampling.max_new_tokens=12", "--prompt_tokens=16")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("cp_evaluate") / "run"
    commands.run("cp_heads.train", *TINY, f"--workdir={path}")
    return path


def test_evaluate_and_plot_keep_their_contracts(run):
    flags = (*TINY, *SHORT, f"--checkpoint={run}", "--texts=corpus", "--temperatures=0,1")
    result, _ = commands.run("cp_heads.evaluate", *flags, "--require=expected_tokens_per_call>=1")
    for row in result["rows"]:
        assert {"rank", "transition", "n", "expected_tokens_per_call"} <= row.keys()
        assert (row["rank"], row["transition"], row["n"]) == (2, "identity", 2)
        assert 1 <= row["expected_tokens_per_call"] <= 2
    assert [row["temperature"] for row in result["rows"]] == [0, 1]
    plotted, _ = commands.run("cp_heads.plot", f"--workdir={run}")
    names = [pathlib.Path(path).name for path in plotted["plots"]]
    assert names == ["acceptance_greedy_by_rank.png", "acceptance_t1_by_rank.png"]


def test_tune_trains_compares_and_keeps_a_choice(run, tmp_path):
    flags = (*TINY, *SHORT, f"--checkpoint={run}", f"--workdir={tmp_path}", "--texts=corpus")
    result, _ = commands.run("cp_heads.tune", *flags, "--ranks=1", "--sequences=1")
    assert (tmp_path / "heads" / "cp_r1_n2").is_dir()
    assert [row["method"] for row in result["rows"]] == ["autoregressive", "cp r1 n2 greedy"]
    kept = json.loads((tmp_path / "tuned.json").read_text())
    assert kept["chosen"] == result["chosen"]
    assert set(result["chosen"]["hashes"]) == {"model", "tokenizer", "template"}


def test_wrong_input_is_one_line(tmp_path):
    flags = (*TINY, f"--checkpoint={tmp_path}")
    line = commands.refusal("cp_heads.evaluate", *flags, "--config.sampling.temperature=-1.0")
    assert line.endswith("sampling.temperature=-1.0 must not be negative")
    line = commands.refusal("cp_heads.plot", f"--rows={tmp_path}/nothing.jsonl")
    assert line.endswith("--rows alone needs --out, a folder for the figures")
