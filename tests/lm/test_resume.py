# SPDX-License-Identifier: Apache-2.0
"""Training that is killed, stopped or damaged goes on, bit for bit, or says in one line why not."""

import json
import pathlib
import shutil
import signal
import time

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from lm import checkpoint
from lm.errors import RunError
from tests import commands

STEPS = 14
FLAGS = (
    *commands.SMOKE,
    f"--config.train.steps={STEPS}",
    "--config.train.checkpoint_every=3",
    "--config.train.log_every=1",
    "--config.train.verify_every=6",
)


def train(workdir, *flags, **options):
    return commands.run("single_pass.train", *FLAGS, f"--workdir={workdir}", *flags, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: its directory and result."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    result, err = train(workdir)
    assert "equals its N passes" in err
    return workdir, result


def interrupt(workdir: pathlib.Path, step: int, number: int) -> int:
    """Starts a run and sends a signal once `step` is in the metrics; the exit status."""
    process = commands.start("single_pass.train", *FLAGS, f"--workdir={workdir}")
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=300)
    return process.returncode


def steps_logged(workdir):
    return [
        json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_run_is_complete(finished):
    workdir, result = finished
    assert result["step"] == STEPS
    assert np.isfinite(result["loss"])
    assert steps_logged(workdir) == list(range(1, STEPS + 1))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss_per_token"] < 0.8 * rows[0]["loss_per_token"]
    assert {"tokens_per_s", "step_ms", "grad_norm", "loss_per_turn"} <= rows[-1].keys()
    assert json.loads((workdir / "env.json").read_text())["packages"]["jax"]
    assert list((workdir / "tensorboard").glob("events*"))


def test_a_finished_run_only_reports(finished):
    workdir, result = finished
    again, err = train(workdir)
    assert again == result
    assert "already trained" in err


def test_sigkill_then_the_same_parameters(finished, tmp_path):
    step = int(np.random.default_rng().integers(2, STEPS - 1))
    assert interrupt(tmp_path, step, signal.SIGKILL) == -signal.SIGKILL
    result, _ = train(tmp_path)
    assert result == finished[1], f"killed at step {step}"
    assert steps_logged(tmp_path) == list(range(1, STEPS + 1))


def test_sigterm_saves_first(finished, tmp_path):
    assert interrupt(tmp_path, 4, signal.SIGTERM) == 143
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert saved >= 5  # step 4 is logged while step 5 runs
    result, err = train(tmp_path)
    assert f"resuming from step {saved}" in err
    assert result == finished[1]


def copied(finished, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    return workdir


def test_half_written_and_damaged_checkpoints_are_ignored_with_a_message(finished, tmp_path):
    workdir = copied(finished, tmp_path)
    newest = workdir / "checkpoints" / str(STEPS)
    half = workdir / "checkpoints" / f"{STEPS - 1}.orbax-checkpoint-tmp-0"
    half.mkdir()
    for path in (newest / "state").rglob("*"):
        if path.is_file() and path.stat().st_size:
            path.write_bytes(b"")
    result, err = train(workdir)
    assert result == finished[1]
    assert f"ignoring the half-written checkpoint {half}" in err
    assert f"ignoring the unreadable checkpoint {newest}" in err
    again, err = train(workdir)  # what was damaged has been written anew
    assert again == finished[1]
    assert "ignoring the unreadable" not in err
    assert "already trained" in err


def test_another_shape_is_one_line(finished, tmp_path):
    workdir = copied(finished, tmp_path)
    line = commands.refusal(
        "single_pass.train", *FLAGS, f"--workdir={workdir}", "--config.model.mlp_dim=64"
    )
    assert (
        "is of another shape: params/layers/mlp/down/kernel is [1, 48, 32] there, [1, 64, 32]"
        in line
    )
    assert json.loads((workdir / "config.json").read_text())["model"]["mlp_dim"] == 48


def test_a_non_finite_loss_is_one_line(tmp_path):
    line = commands.refusal(
        "single_pass.train",
        *FLAGS,
        f"--workdir={tmp_path}",
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.clip_norm=0.0",
        status=1,
    )
    assert "non-finite loss or gradient at step" in line


def test_a_disk_that_fails_midway_ends_in_one_line(tmp_path, finished):
    """The writers' own threads complain first; the command's own line comes last. `finished` has
    prepared the data, so that the checkpoint is the first large file."""
    _, err = commands.run(
        "single_pass.train", *FLAGS, f"--workdir={tmp_path}", status=1, file_kib=20
    )
    assert "train.py: cannot write" in err.strip().splitlines()[-1]


def test_a_full_disk_is_refused_before_writing(tmp_path, monkeypatch):
    store = checkpoint.Checkpoints(tmp_path)
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    data = iter(grain.MapDataset.range(3).to_iter_dataset())
    with pytest.raises(RunError, match="No space left on device"):
        store.save(1, {"a": jnp.zeros(100)}, data, {})
    store.close()
    assert store.steps() == []
