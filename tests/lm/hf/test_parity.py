# SPDX-License-Identifier: Apache-2.0
"""Our logits against those that `transformers` computed for the golden checkpoints."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lm.errors import UserError
from lm.hf import parity, weights

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "hf"
NAMES = ("gemma", "llama", "llama3", "qwen2", "qwen2_yarn", "qwen3")


def _case(name):
    return np.load(GOLDEN / name / "tokens.npy"), np.load(GOLDEN / name / "logits.npy")


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name):
    result = parity.parity(GOLDEN / name, golden=True)
    assert result["max_abs"] < 1e-4
    assert 0 <= result["kl"] < 1e-9
    assert result["family"] == name.split("_")[0].replace("llama3", "llama")
    assert result["positions"] == _case(name)[0].size


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama3", {"rope_scaling": None}),
        ("qwen2_yarn", {"rope_scaling": None}),
        ("llama", {"rope_theta": 10000.0}),
        ("gemma", {"scale_embeddings": False}),
        ("gemma", {"norm_plus_one": False}),
        ("gemma", {"activation": "silu"}),
    ],
)
def test_the_golden_files_can_tell(name, changes):
    """Each setting moves these logits far beyond the tolerance, so agreement means something."""
    tokens, expected = _case(name)
    config, params = weights.load(GOLDEN / name)
    logits = parity.model_logits(dataclasses.replace(config, **changes), params, tokens)
    assert np.abs(logits - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("qwen2", ("layers", "attention", "q", "bias")),
        ("qwen2", ("layers", "attention", "k", "bias")),
        ("qwen2", ("layers", "attention", "v", "bias")),
        ("qwen3", ("layers", "attention", "q_norm", "scale")),
        ("qwen3", ("layers", "attention", "k_norm", "scale")),
    ],
)
def test_the_golden_files_use_every_optional_parameter(name, path):
    tokens, expected = _case(name)
    config, params = weights.load(GOLDEN / name)
    node = params
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = np.ones_like(node[path[-1]])
    assert np.abs(parity.model_logits(config, params, tokens) - expected).max() > 1e-2


def test_kl_by_hand():
    theirs, ours = np.log([[[0.5, 0.5]]]), np.log([[[0.25, 0.75]]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(parity._mean_kl(theirs + 3, ours - 5), expected)
    assert np.isnan(parity._mean_kl(theirs * np.nan, ours))


def test_bad_requests(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="choose one of prompt, golden"):
        parity.parity(GOLDEN / "llama", prompt="a", golden=True)
    with pytest.raises(UserError, match=r"64\.\.64 are not all below the vocabulary of 64"):
        parity.parity(GOLDEN / "llama", tokens=[[64]])
    with pytest.raises(UserError, match=r"shape \[3\]"):
        parity.parity(GOLDEN / "llama", tokens=[1, 2, 3])
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        parity.parity(GOLDEN / "llama", prompt="hello")
    with pytest.raises(UserError, match=r"config\.json"):
        parity.parity(tmp_path, golden=True)
    folder = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))
    np.save(folder / "logits.npy", np.zeros((2, 48, 65), np.float32))
    with pytest.raises(UserError, match=r"logits \[2, 48, 65\] there, \[2, 48, 64\] here"):
        parity.parity(folder, golden=True)
    (folder / "logits.npy").unlink()
    with pytest.raises(UserError, match=r"logits\.npy: No such file"):
        parity.parity(folder, golden=True)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="torch is not installed: `pip install torch transformers`"):
        parity.parity(GOLDEN / "llama")


def _command(folder, *flags):
    command = [sys.executable, "-m", "experiments.parity", f"--hf_dir={folder}", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_command_passes():
    done = _command(GOLDEN / "qwen3", "--golden", "--max_abs=1e-4")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["family"] == "qwen3"
    assert result["max_abs"] < 1e-4
    assert result["kl"] < 1e-9


def test_command_fails_beyond_the_tolerance(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "qwen3", tmp_path / "qwen3"))
    logits = np.load(folder / "logits.npy")
    logits[1, 47, 63] += 0.01
    np.save(folder / "logits.npy", logits)
    done = _command(folder, "--golden")
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["max_abs"] > 0.009
    assert "beyond max_abs <= 0.001" in done.stderr
