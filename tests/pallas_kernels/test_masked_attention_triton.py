# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of masked_attention: their numerics interpreted on a CPU, whole programs
compiled for GPUs, and what is refused."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ops import dispatch
from ops.masked_attention import masked_attention
from ops.visibility import Visibility
from pallas_kernels import masked_attention_triton_config as configs
from pallas_kernels import triton_call
from tests import gpu_target
from tests.ops.op_cases import arrays

KERNELS = ["_forward_kernel", "_dq_kernel", "_dkdv_kernel"]

compiles = pytest.mark.skipif(
    bool(gpu_target.missing()), reason=f"compile-only packages: {gpu_target.missing()}"
)


@compiles
def test_numerics_interpreted():
    path = pathlib.Path(__file__).with_name("interpreted_masked_attention.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    root = path.parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 15


def gradients(q, k, v, *vectors):
    def loss(q, k, v):
        mask = Visibility(*vectors)
        out, lse = masked_attention(q, k, v, mask, return_lse=True, implementation="triton")
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(lse)

    return jax.grad(loss, (0, 1, 2))(q, k, v)


def compiled(chip, head_dim, dtype, function=gradients, T=1000, S=1000, vectors=3):
    """`function` compiled for a group of four query heads and `vectors` of the mask's vectors."""
    q = gpu_target.abstract(chip, (2, T, 8, head_dim), dtype)
    k = gpu_target.abstract(chip, (2, S, 2, head_dim), dtype)
    shapes = [(2, S), (2, S), (2, S), (2,)][:vectors]
    mask = [gpu_target.abstract(chip, shape, jnp.int32) for shape in shapes]
    with gpu_target.target(chip):
        return gpu_target.compile(jax.jit(function), q, k, k, *mask)


def passes(program):
    """The names of the attention kernels; the lists of blocks have one of their own."""
    names = [kernel.name for kernel in program.kernels]
    assert "compact" in names
    return [name for name in names if name != "compact"]


def fits(program, chip):
    limit = gpu_target.CHIPS[chip].shared_per_block
    return all(kernel.shared <= limit for kernel in program.kernels)


@compiles
@pytest.mark.parametrize("chip", ["H100", "A100"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_compiles_without_spills(chip, head_dim):
    program = compiled(chip, head_dim, "bfloat16")
    print(chip, head_dim, *program.kernels, sep="\n  ")
    assert passes(program) == KERNELS
    assert not [kernel for kernel in program.kernels if kernel.spilled]
    assert fits(program, chip)


@compiles
def test_without_hidden_runs_in_memory_that_grows_with_the_sequence():
    """The commonest mask and head dim: other kernels, because hidden runs cost nothing there."""
    program = compiled("H100", 128, "bfloat16", T=32768, S=32768, vectors=1)
    assert passes(program) == KERNELS
    assert not [kernel for kernel in program.kernels if kernel.spilled]
    scores = 2 * 8 * 32768**2
    assert program.memory.temp_size_in_bytes < scores / 50


@compiles
def test_float32_compiles():
    program = compiled("A100", 64, "float32", vectors=4)
    assert passes(program) == KERNELS
    assert fits(program, "A100")


@compiles
def test_one_row_of_float16_compiles():
    def forward(q, k, v, *vectors):
        return masked_attention(q, k, v, Visibility(*vectors), implementation="triton")

    program = compiled("H100", 64, "float16", forward, T=1, vectors=4)
    assert passes(program) == KERNELS[:1]
    assert fits(program, "H100")


@compiles
def test_compiles_inside_shard_map():
    """Types: everything that comes out differs over the mesh axes that the arguments differ
    over."""
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads = PartitionSpec("data", None, "tensor")
    specs = (heads, heads, heads, PartitionSpec("data"))
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=(heads,) * 3)
    x = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
    with gpu_target.target("H100"):
        shapes = jax.eval_shape(sharded, x, x, x, jax.ShapeDtypeStruct((2, 64), jnp.int32))
    assert [shape.shape for shape in shapes] == [x.shape] * 3


def refusal(q, k, v):
    mask = Visibility.causal(q.shape[0], k.shape[1])
    with pytest.raises(dispatch.Unsupported) as refused:
        masked_attention(q, k, v, mask, implementation="triton")
    return str(refused.value)


def test_refusals(monkeypatch):
    (x,), (y,) = arrays(0, (1, 16, 2, 64)), arrays(0, (1, 16, 2, 96))
    assert refusal(x, x, x) == "triton: runs on CUDA GPUs (here: cpu)"
    with dispatch.target_platform("gpu"):
        assert refusal(x, x, x) == "triton: no CUDA GPU (here: cpu)"
        with triton_call.target_capability(75):
            assert "compute capability 75" in refusal(x, x, x)
        with triton_call.target_capability(90):
            assert refusal(y, y, y) == "triton: head dim 96; 64, 128 and 256 are served"
            assert "float32, bfloat16 and float32" in refusal(x, x.astype("bfloat16"), x)
            monkeypatch.setitem(sys.modules, "triton", None)
            triton_call.require.cache_clear()
            assert refusal(x, x, x).startswith("triton: triton does not import")
    triton_call.require.cache_clear()


def test_configs():
    for name in configs.PASSES:
        for head_dim in configs.HEAD_DIMS:
            for dtype in ("bfloat16", "float32"):
                assert configs.config(name, 80, head_dim, dtype) == configs.config(
                    name, 89, head_dim, dtype
                )
                assert configs.config(name, 100, head_dim, dtype) == configs.config(
                    name, 90, head_dim, dtype
                )
    other = configs.Config(64, 32, 4, 1)
    with configs.override(dq=other):
        assert configs.config("dq", 90, 128, "bfloat16") == other
        assert configs.config("forward", 90, 128, "bfloat16") != other
    assert configs.config("dq", 90, 128, "bfloat16") != other
    with pytest.raises(ValueError, match="unknown passes"):
        configs.override(backward=other)
    with pytest.raises(ValueError, match="powers of two"):
        configs.Config(96, 32, 4, 1)


@compiles
def test_another_config_is_another_program():
    """Inside one jitted function, so the override has to be part of jit's cache key."""
    x = jax.ShapeDtypeStruct((1, 100, 2, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 100), jnp.int32)

    @jax.jit
    def forward(q, k, v, until):
        return masked_attention(q, k, v, Visibility(until), implementation="triton")

    with gpu_target.target("H100"):
        table = str(jax.make_jaxpr(forward)(x, x, x, mask))
        with configs.override(forward=configs.Config(16, 32, 4, 1)):
            other = str(jax.make_jaxpr(forward)(x, x, x, mask))
    assert "BLOCK_Q=128" in table
    assert "BLOCK_Q=16" in other
