# SPDX-License-Identifier: Apache-2.0
"""The 8B preset, compiled whole for 64 chips by the real TPU compiler; its memory decides."""

import json

import pytest

from tests import commands

PAPER = "--config=configs/single_pass.py:paper"


# whole models for more than one pod are long runs
_PODS = (
    ("v5p:4x4x4", 95 * 2**30),
    pytest.param("v6e:8x8", 32 * 2**30, marks=pytest.mark.slow),
)


@pytest.mark.parametrize(("topology", "hbm"), _PODS)
def test_the_paper_preset_fits(topology, hbm):
    result, _ = commands.run("compile", PAPER, f"--topology={topology}")
    print(json.dumps(result))
    assert result["parameters"] == 8030261248
    assert result["chips"] == 64
    assert result["hbm_bytes"] == hbm
    state = 12 * result["parameters"] / 64  # float32 parameters and two moments, fully sharded
    assert state < result["bytes_per_chip"] < hbm


def test_what_does_not_fit_is_one_line():
    line = commands.refusal(
        "compile",
        PAPER,
        "--topology=v5e:2x2",
        "--config.train.batch_size=4",
        "--config.model.num_layers=2",
        "--config.data.seq_len=131072",
        status=1,
    )
    assert "v5e:2x2: the step does not fit" in line


def test_unknown_topologies_are_one_line():
    assert "topology 'v9:2x2' cannot be described" in commands.refusal(
        "compile", PAPER, "--topology=v9:2x2"
    )
