# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of top_tokens compiled for GPUs that are not here. `interpreted_top_tokens`
has their numerics."""

import functools

import jax
import pytest

from ops.top_tokens import top_tokens
from tests import gpu_target

gpu_target.require()


def compiled(chip, shape, k):
    array = functools.partial(gpu_target.abstract, chip)
    arguments = array(shape, "float32"), *(array(shape[:-1], "int32") for _ in range(2))

    def chosen(scores, begin, end):
        return top_tokens(scores, k, begin=begin, end=end, implementation="triton")

    with gpu_target.target(chip):
        return gpu_target.compile(jax.jit(chosen), *arguments)


def check(program, chip, kernels):
    print(chip, *program.kernels, sep="\n  ")
    assert [kernel.name for kernel in program.kernels] == kernels
    assert not [kernel for kernel in program.kernels if kernel.spilled]
    limit = gpu_target.CHIPS[chip].shared_per_block
    assert all(kernel.shared <= limit for kernel in program.kernels)


@pytest.mark.parametrize("chip", ["H100", "A100"])
def test_long_rows(chip):
    program = compiled(chip, (1, 524_288), 2048)
    check(program, chip, ["count"] * 4 + ["tally", "write"])
    assert program.memory.temp_size_in_bytes < 100_000


@pytest.mark.parametrize("chip", ["H100", "A100"])
def test_short_rows_of_several_heads(chip):
    check(compiled(chip, (2, 8, 2560), 2048), chip, ["one_program"])
    check(compiled(chip, (1, 8192), 64), chip, ["one_program"])
