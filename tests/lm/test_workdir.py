# SPDX-License-Identifier: Apache-2.0
"""What a directory of a run keeps to itself."""

import dataclasses

import pytest

from lm.config import Config
from lm.errors import UserError
from lm.single_pass import compare
from lm.workdir import Workdir


def test_a_trained_run_is_not_written_over(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.create(Config())
    workdir.record(Config())
    workdir.checkpoints.mkdir()
    before = (tmp_path / "config.json").read_text()
    other = dataclasses.replace(Config(), init_from="x")
    with pytest.raises(UserError, match="holds a trained run: take another --workdir"):
        compare.compare(other, workdir, compare.Options())
    assert (tmp_path / "config.json").read_text() == before
    with pytest.raises(UserError, match="init_from is the workdir itself"):
        workdir.create(dataclasses.replace(Config(), init_from=str(tmp_path / ".")))


def test_a_config_that_is_no_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"\xff')
    with pytest.raises(UserError, match=r"config\.json"):
        Workdir(tmp_path).config()
