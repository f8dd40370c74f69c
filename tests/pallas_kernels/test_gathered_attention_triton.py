# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of gathered_attention compiled for GPUs that are not here.
`interpreted_gathered_attention` has their numerics."""

import functools

import jax
import pytest

from ops.gathered_attention import gathered_attention
from tests import gpu_target

gpu_target.require()

ONE_TOKEN = ["attend", "merge"]
CHUNK = ["gather", "attend"]


def compiled(chip, T, S=4096, L=2, B=1, N=32, K=8, H=128, M=2688, dtype="bfloat16", rope=True):
    array = functools.partial(gpu_target.abstract, chip)
    arguments = {
        "q": array((B, T, N, H), dtype),
        "k": array((L, B, S, K, H), dtype),
        "v": array((L, B, S, K, H), dtype),
        "indices": array((B, M), "int32"),
        "counts": array((B,), "int32"),
        "lengths": array((B,), "int32"),
        "layer": array((), "int32"),
    }
    if rope:
        arguments["rope"] = (array((B, 1, M, H // 2), "float32"),) * 2

    def attend(arguments):
        return gathered_attention(**arguments, implementation="triton")

    with gpu_target.target(chip):
        return gpu_target.compile(jax.jit(attend), arguments)


def check(program, chip, kernels):
    print(chip, *program.kernels, sep="\n  ")
    assert [kernel.name for kernel in program.kernels] == kernels
    assert not [kernel for kernel in program.kernels if kernel.spilled]
    limit = gpu_target.CHIPS[chip].shared_per_block
    assert all(kernel.shared <= limit for kernel in program.kernels)


@pytest.mark.parametrize(("chip", "rope"), [("H100", False), ("H100", True), ("A100", True)])
def test_one_token_of_a_long_cache(chip, rope):
    """More than 2 ** 31 entries; nothing but what is listed is copied."""
    program = compiled(chip, 1, S=524_288, L=4, rope=rope)
    check(program, chip, ONE_TOKEN)
    assert program.memory.temp_size_in_bytes < 2e6


@pytest.mark.parametrize("chip", ["H100", "A100"])
def test_a_chunk(chip):
    program = compiled(chip, 512, S=524_288, L=4)
    check(program, chip, CHUNK)
    assert program.memory.temp_size_in_bytes < 1.1 * (2 * 2688 * 8 * 128 * 2)


@pytest.mark.parametrize(("chip", "H"), [("H100", 64), ("H100", 256), ("A100", 64), ("A100", 256)])
def test_head_dims(chip, H):
    check(compiled(chip, 1, H=H), chip, ONE_TOKEN)
    check(compiled(chip, 512, H=H), chip, CHUNK)


def test_float32():
    check(compiled("A100", 1, H=64, dtype="float32"), "A100", ONE_TOKEN)
    check(compiled("A100", 70, H=64, dtype="float32"), "A100", CHUNK)
