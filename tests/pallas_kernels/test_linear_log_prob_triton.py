# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of linear_log_prob: their numerics interpreted on a CPU, whole programs
compiled for GPUs, and what is refused."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from ops import dispatch
from ops.linear_log_prob import linear_log_prob
from pallas_kernels import linear_log_prob_triton_config as configs
from pallas_kernels import triton_call
from tests import gpu_target
from tests.ops.op_cases import arrays

compiles = pytest.mark.skipif(
    bool(gpu_target.missing()), reason=f"compile-only packages: {gpu_target.missing()}"
)


@compiles
def test_numerics_interpreted():
    path = pathlib.Path(__file__).with_name("interpreted_linear_log_prob.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    root = path.parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 14


def weighted(x, w, targets, weights, **settings):
    def loss(x, w):
        return linear_log_prob(x, w, targets, weights, **settings)[0]

    return jax.value_and_grad(loss, (0, 1))(x, w)


def general(x, w, targets, weights, **settings):
    log_prob, pullback = jax.vjp(lambda x, w: linear_log_prob(x, w, targets, **settings), x, w)
    return log_prob, pullback(weights)


def compiled(chip, function, R, D, V, dtype="bfloat16", **settings):
    shapes = ((R, D), dtype), ((V, D), dtype), ((R,), "int32"), ((R,), "float32")
    arguments = [gpu_target.abstract(chip, *shape) for shape in shapes]

    def program(*arguments):
        return function(*arguments, implementation="triton", **settings)

    with gpu_target.target(chip):
        return gpu_target.compile(jax.jit(program), *arguments)


@compiles
@pytest.mark.parametrize("chip", ["H100", "A100"])
def test_compiles_without_spills(chip):
    """The size that is measured: nothing above 2 GiB beside arguments and results."""
    for function, kernels in (
        (weighted, ["_exponentials_kernel"]),
        (general, ["_statistics_kernel", "_gradients_kernel"]),
    ):
        program = compiled(chip, function, 32768, 2048, 128256)
        print(chip, function.__name__, *program.kernels, sep="\n  ")
        assert sorted({kernel.name for kernel in program.kernels}) == sorted(kernels)
        assert not [kernel for kernel in program.kernels if kernel.spilled]
        assert program.memory.temp_size_in_bytes <= 2 << 30


@compiles
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_setting_compiles(dtype):
    """Rows that are not aligned, a cap and excluded columns."""
    for function in (weighted, general):
        program = compiled("A100", function, 300, 64, 5003, dtype, softcap=30.0, valid_vocab=5000)
        assert not [kernel for kernel in program.kernels if kernel.spilled]


def test_rows_of_chunks():
    config = configs.Config(1024, 512, 4096, 8, 1)
    assert config.rows(32768, 128256, 2) == (4096, 1024)
    assert config.rows(100, 128256, 2) == (100, 100)
    for num_rows, vocab, itemsize in ((32768, 10**6, 4), (5000, 10**7, 2), (4099, 50257, 2)):
        chunk, part = config.rows(num_rows, vocab, itemsize)
        assert chunk % part == 0
        assert (part - 8) * vocab * 4 <= max(512 << 20, 128 * vocab * 4)
        assert (chunk - 8 * chunk // part) * vocab * itemsize <= max(
            1024 << 20, 128 * vocab * itemsize
        )
    with pytest.raises(ValueError, match="powers of two"):
        configs.Config(1024, 512, 3000, 8, 1)


@compiles
def test_another_config_is_another_program():
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 16), (9000, 16)))
    targets = jax.ShapeDtypeStruct((64,), jnp.int32)

    @jax.jit
    def forward(x, w, targets):
        return linear_log_prob(x, w, targets, implementation="triton")

    with gpu_target.target("H100"):
        table = str(jax.make_jaxpr(forward)(x, w, targets))
        with configs.override(configs.Config(1024, 512, 1024, 4, 1)):
            other = str(jax.make_jaxpr(forward)(x, w, targets))
    assert f"BLOCK={configs.config().block}" in table
    assert "BLOCK=1024" in other


def refusal(x, w):
    with pytest.raises(dispatch.Unsupported) as refused:
        linear_log_prob(x, w, jnp.zeros(len(x), jnp.int32), implementation="triton")
    return str(refused.value)


def test_refusals(monkeypatch):
    x, w = arrays(0, (4, 3), (10, 3))
    assert refusal(x, w) == "triton: runs on CUDA GPUs (here: cpu)"
    with dispatch.target_platform("gpu"):
        assert refusal(x, w) == "triton: no CUDA GPU (here: cpu)"
        with triton_call.target_capability(75):
            assert "compute capability 75" in refusal(x, w)
        with triton_call.target_capability(90):
            assert "type float8_e4m3fn; bfloat16" in refusal(x.astype("float8_e4m3fn"), w)
            monkeypatch.setitem(sys.modules, "triton", None)
            triton_call.require.cache_clear()
            assert refusal(x, w).startswith("triton: triton does not import")
    triton_call.require.cache_clear()
