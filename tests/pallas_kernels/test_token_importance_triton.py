# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of token_importance compiled for GPUs that are not here.
`interpreted_token_importance` has their numerics."""

import functools

import jax
import pytest

from ops.token_importance import token_importance
from tests import gpu_target

gpu_target.require()

ONE_ROW = ["scan", "normalizer", "vote"]
MANY_ROWS = ["window_lse", "window_vote"]


def compiled(chip, W, S=4096, L=2, B=1, N=32, K=8, H=128, dtype="bfloat16", key_dtype="bfloat16",
             **settings):  # fmt: skip
    array = functools.partial(gpu_target.abstract, chip)
    arguments = {
        "q": array((B, W, N, H), dtype),
        "k": array((L, B, S, K, H), key_dtype),
        "begin": array((B,), "int32"),
        "end": array((B, W), "int32"),
        "layer": array((), "int32"),
    }
    if key_dtype in ("int8", "float8_e4m3fn"):
        arguments["k_scale"] = array((L, B, S, K), "float32")

    def scores(arguments):
        return token_importance(**arguments, implementation="triton", **settings)

    with gpu_target.target(chip):
        return gpu_target.compile(jax.jit(scores), arguments)


def check(program, chip, kernels):
    print(chip, *program.kernels, sep="\n  ")
    assert [kernel.name for kernel in program.kernels] == kernels
    assert not [kernel for kernel in program.kernels if kernel.spilled]
    limit = gpu_target.CHIPS[chip].shared_per_block
    assert all(kernel.shared <= limit for kernel in program.kernels)


@pytest.mark.parametrize(
    ("chip", "key_dtype"),
    [
        ("H100", "bfloat16"),
        ("H100", "int8"),
        ("H100", "float8_e4m3fn"),
        ("A100", "bfloat16"),
        ("A100", "float8_e4m3fn"),
    ],
)
def test_one_row_of_a_long_cache(chip, key_dtype):
    """More than 2 ** 31 keys' entries; beside them, only what is kept of the products."""
    S, N = 524_288, 32
    program = compiled(chip, 1, S=S, L=4, key_dtype=key_dtype)
    check(program, chip, ONE_ROW)
    kept = N * S * (4 if key_dtype == "bfloat16" else 2)
    assert program.memory.temp_size_in_bytes < 1.05 * kept


@pytest.mark.parametrize(("chip", "H"), [("H100", 64), ("H100", 256), ("A100", 64), ("A100", 256)])
def test_head_dims(chip, H):
    check(compiled(chip, 1, H=H), chip, ONE_ROW)
    check(compiled(chip, 32, H=H), chip, MANY_ROWS)


@pytest.mark.parametrize("chip", ["H100", "A100"])
def test_a_window_of_queries(chip):
    S, W, N = 32768, 32, 32
    settings = {"heads": "kv", "reduce": "max", "return_lse": True}
    program = compiled(chip, W, S=S, **settings)
    check(program, chip, MANY_ROWS)
    assert program.memory.temp_size_in_bytes < N * W * S * 4 / 50


@pytest.mark.parametrize("W", [1, 4])
def test_types_that_differ(W):
    kernels = ONE_ROW if W == 1 else MANY_ROWS
    check(compiled("H100", W, dtype="float32", key_dtype="float8_e4m3fn"), "H100", kernels)
    check(compiled("H100", W, H=64, dtype="float32", key_dtype="float32"), "H100", kernels)
