# SPDX-License-Identifier: Apache-2.0
"""Every implementation under random masks: trees, async programs and windows, alone and packed.

On a GPU (`-m gpu`) 200 masks; the table goes to the directory that SKIM_RESULTS names.
"""

import os
import pathlib

import jax
import numpy as np
import pytest

from lm.benchmarks import attention_check
from lm.benchmarks.random_masks import FAMILIES
from tests import commands
from tests.ops.op_tolerances import RELATIVE

SMALL = attention_check.SMALL_SHAPES


def test_tolerances_are_those_of_the_ops():
    assert attention_check.TOLERANCES == RELATIVE


def test_xla_under_random_masks():
    rows = list(attention_check.sweep(("xla",), ("float32", "bfloat16"), 10, shapes=SMALL))
    assert [row["dtype"] for row in rows] == ["float32"] * 10 + ["bfloat16"] * 2
    assert not attention_check.failures(rows)
    assert not [row for row in rows if "refused" in row]
    assert {row["family"] for row in rows} == set(FAMILIES)


@pytest.mark.parametrize(
    ("damage", "broken"),
    [
        (lambda got: got["out"].__imul__(1.03), "error_out"),
        (lambda got: got["dk"].fill(np.nan), "error_dk"),
        (lambda got: got["lse"].fill(0.0), "error_lse"),
        (lambda got: got["dq"].__iadd__(1e-7), "exact_zeros"),
    ],
)
def test_damage_is_noticed(damage, broken):
    problem = next(
        p
        for p in attention_check.problems(99, shapes=SMALL[:1])
        if not np.asarray(p.mask().as_array(p.shape.T)).any(-1).all()
    )
    want = attention_check.expected(problem, problem.arrays("float32"))
    got = {name: values.copy() for name, values in want.items()}
    assert attention_check.compare(got, want, "float32")["passed"]
    damage(got)
    row = attention_check.compare(got, want, "float32")
    assert not row["passed"]
    if broken == "exact_zeros":
        assert not row[broken]
    else:
        assert row[broken] > 1e-2


def test_the_command_lists_what_is_refused(tmp_path):
    flags = ("--implementation=xla,mosaic_gpu", "--small", "--cases=1", "--dtypes=float16")
    result, err = commands.run("benchmarks.check_attention", *flags, f"--out={tmp_path}", status=1)
    assert "served no call: mosaic_gpu" in err.strip().splitlines()[-1]
    assert result["failed"] == 0
    refused = [line for line in result["lines"] if line["implementation"] == "mosaic_gpu"]
    assert refused
    assert all("mosaic_gpu" in line["refused"] for line in refused)
    table = (tmp_path / "attention_check.md").read_text()
    assert "| xla | float16 |" in table
    assert "refused: " in table
    lines = (tmp_path / "attention_check.jsonl").read_text().splitlines()
    assert len(lines) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_gpu_kernels_under_random_masks(implementation, tmp_path):
    assert jax.default_backend() == "gpu"
    rows = list(attention_check.sweep((implementation,)))
    lines = attention_check.summary(rows)
    folder = pathlib.Path(os.environ.get("SKIM_RESULTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"attention_check_{implementation}.md").write_text(attention_check.markdown(lines))
    assert sum("refused" not in row for row in rows if row["dtype"] == "bfloat16") == 200
    assert not attention_check.failures(rows)
