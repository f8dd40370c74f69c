# SPDX-License-Identifier: Apache-2.0
"""Evaluate and tune as a user runs them, on one small run."""

import json

import pytest

from tests import commands

TINY = (
    "--config=configs/token_select.py:smoke",
    *(flag for flag in commands.TINY if "data." not in flag),
    "--config.train.steps=1",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("token_select") / "run"
    commands.run("token_select.train", *TINY, f"--workdir={path}")
    return path


def test_evaluate_and_tune_keep_their_contracts(trained, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"prompt": "word by word, " * 22}) + "\n")
    data = (*TINY, f"--checkpoint={trained}", f"--data={file}", "--max_new_tokens=4")
    one = ("--ks=272", "--n_locals=32", "--pools=0", "--thetas=", f"--workdir={tmp_path}")
    tuned, _ = commands.run("token_select.tune", *data, *one)
    assert tuned["chosen"]["k"] == 272
    assert tuned["chosen"]["agreement"] == 1  # everything is read
    flags = (*data, f"--tuned={tmp_path}", "--methods=token_select", "--require=agreement>=0.98")
    result, err = commands.run("token_select.evaluate", *flags, "--require=accuracy>0", status=1)
    assert [row["method"] for row in result["rows"]] == ["dense", "token_select"]
    for row in result["rows"]:
        assert {"task", "length", "budget", "accuracy", "agreement", "ci95"} <= row.keys()
        assert row["token_ms_p50"] > 0
    assert len((trained / "eval.jsonl").read_text().splitlines()) == 2
    assert err.strip().endswith("check failed: accuracy=nan, required accuracy>0")


def test_bad_input_is_one_line(trained):
    flags = (*TINY, f"--checkpoint={trained}", "--budgets=5%")
    line = commands.refusal("token_select.evaluate", *flags)
    assert line.endswith(
        "a budget of 26 tokens leaves nothing to select beside select.n_init=8 and "
        "select.n_local=32"
    )
