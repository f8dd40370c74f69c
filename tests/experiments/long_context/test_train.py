# SPDX-License-Identifier: Apache-2.0
"""Training on long-context tasks from the command line."""

from tests import commands

TINY = (
    "--config=configs/token_select.py:smoke",
    "--config.model.num_layers=1",
    "--config.model.embed_dim=32",
    "--config.train.steps=3",
)


def test_train_writes_a_run_and_reports_it_again(tmp_path):
    flags = (*TINY, f"--workdir={tmp_path / 'run'}")
    result, err = commands.run("token_select.train", *flags)
    assert result.keys() == {"step", "loss", "params_sha256"}
    assert result["step"] == 3
    assert "answers" in err
    again, err = commands.run("token_select.train", *flags)
    assert again == result
    assert "already trained" in err


def test_unknown_tasks_are_refused(tmp_path):
    flags = (*TINY, "--config.tasks.names=('vtt',)", f"--workdir={tmp_path / 'run'}")
    said = commands.refusal("token_select.train", *flags)
    assert "unknown task 'vtt'; known: niah_single_1" in said
