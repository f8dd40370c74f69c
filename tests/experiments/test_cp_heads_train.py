# SPDX-License-Identifier: Apache-2.0
"""The commands that train a CP head and attach it, and their one line on bad input."""

import pathlib
import shutil

from tests import commands

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "hf"
SMOKE = "--config=configs/cp_heads.py:smoke"
TINY = (
    SMOKE,
    *(flag for flag in commands.TINY if "seq_len" not in flag),
    "--config.data.seq_len=64",
    "--config.data.source=arithmetic",
    "--config.head.predicted=2",
    "--config.head.rank=2",
    "--config.train.steps=2",
    "--config.train.log_every=1",
)


def test_training_keeps_its_contract(tmp_path):
    result, _ = commands.run("cp_heads.train", *TINY, f"--workdir={tmp_path}")
    assert result.keys() == {"step", "loss", "params_sha256"}
    assert result["step"] == 2
    assert "gate_effective" in (tmp_path / "metrics.jsonl").read_text()


def test_attaching_keeps_its_contract(tmp_path):
    base = shutil.copytree(GOLDEN / "qwen3", tmp_path / "qwen3")
    out = tmp_path / "head"
    result, _ = commands.run("cp_heads.attach", SMOKE, f"--hf_dir={base}", f"--out={out}")
    assert result.keys() == {"head", "rank", "predicted", "parameters", "trained"}
    assert sorted(path.name for path in out.iterdir()) == ["cp_head.json", "cp_head.safetensors"]
    assert sorted(p.name for p in base.iterdir()) == sorted(
        p.name for p in (GOLDEN / "qwen3").iterdir()
    )


def test_wrong_input_is_one_line(tmp_path):
    line = commands.refusal(
        "cp_heads.train", *TINY, f"--workdir={tmp_path}", "--config.head.rank=0"
    )
    assert line.endswith("head.rank=0 must be at least 1")
    line = commands.refusal("cp_heads.attach", f"--hf_dir={GOLDEN / 'qwen3'}")
    assert "--checkpoint=RUN has the head" in line
