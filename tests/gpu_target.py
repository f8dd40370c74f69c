# SPDX-License-Identifier: Apache-2.0
"""Whole jitted programs compiled for NVIDIA GPUs on a machine that has none, and what their
kernels use.

The CUDA plugin's wheels describe a GPU from a text proto and XLA compiles for it; the triton wheel
brings the assembler. What compiles is not run: only a device shows that it is right and fast.

    with gpu_target.target("H100"):
        x = gpu_target.abstract("H100", (8192, 128), "bfloat16")
        program = gpu_target.compile(jax.jit(f), x)
    print(program.memory, program.kernels)
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ops import dispatch
from pallas_kernels import triton_call

PACKAGES = ("jax_cuda12_plugin", "triton", "jax_triton")


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    capability: int
    cores: int
    shared_per_core: int
    shared_per_block: int  # the most that a kernel may ask for
    bandwidth: int
    memory: int
    l2: int
    clock_ghz: float


CHIPS = {
    "H100": Chip(
        "NVIDIA H100 80GB HBM3", 90, 132, 233472, 232448, 3352320000000, 84978434048, 52428800, 1.98
    ),
    "A100": Chip(
        "NVIDIA A100-SXM4-80GB", 80, 108, 167936, 166912, 2039000000000, 85094825984, 41943040, 1.41
    ),
}

_DESCRIPTION = """gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores} clock_rate_ghz: {clock_ghz} fpus_per_core: 128
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_per_core}
  shared_memory_per_block_optin: {shared_per_block}
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} device_memory_size: {memory} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}" """


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel of a program."""

    name: str
    registers: int  # per thread
    spilled: int  # bytes per thread, stored plus loaded
    shared: int | None  # bytes per block; None where only the launch knows (Mosaic GPU)


@dataclasses.dataclass(frozen=True)
class Program:
    memory: Any  # jax's CompiledMemoryStats
    kernels: tuple[Kernel, ...]


def missing() -> list[str]:
    """Which of the compile-only packages are not installed."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def require() -> None:
    """Skips the test module unless they are."""
    if packages := missing():
        pytest.skip(f"not installed: {packages}", allow_module_level=True)


@contextlib.contextmanager
def target(chip: str) -> Iterator[None]:
    """Implementations, and their block sizes, are chosen as on `chip`, and every compilation, of
    whichever compiler, finds the same assembler: XLA remembers for the whole process the version
    of PTX that the first one took."""
    capability = triton_call.target_capability(CHIPS[chip].capability)
    with dispatch.target_platform("gpu"), capability, _assembler_on_path():
        yield


@functools.cache
def devices(chip: str, count: int = 1) -> tuple[Any, ...]:
    """Abstract devices of one host, to lower and compile for."""
    jax.devices()  # registers the plugins, once
    fields = dataclasses.asdict(CHIPS[chip])
    major, minor = divmod(fields["capability"], 10)
    description = _DESCRIPTION.format(major=major, minor=minor, **fields)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=description, topology=f"1x1x{count}"
    )
    return tuple(topology.devices)


def abstract(chip: str, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array that lives on `chip`."""
    mesh = Mesh(np.array(devices(chip)), ("gpu",))
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


def compile(function: Any, *arguments: Any) -> Program:
    """Lowers and compiles, within `target`, a jitted function for arguments made by `abstract`."""
    with _mosaic_reports() as report:
        lowered = function.lower(*arguments)
        compiled = lowered.compile()
        mosaic = _parse_ptxas(report.read_text())
    return Program(compiled.memory_analysis(), (*triton_kernels(lowered), *mosaic))


def triton_kernels(lowered: Any) -> tuple[Kernel, ...]:
    """The jax-triton kernels of a lowered program, one entry per different kernel. XLA hands their
    PTX to the driver's machine, so it is assembled here to see that it can be."""
    kernels = {}
    for config in _custom_calls(lowered, "triton_kernel_call"):
        launch = _fields(_fields(zlib.decompress(config))[1][0])
        kernel = _fields(launch[1][0])
        ptx, shared = kernel[_PTX][0], kernel.get(_SHARED, [0])[0]
        if ptx not in kernels:
            (reported,) = _assemble(ptx.decode())
            kernels[ptx] = dataclasses.replace(reported, shared=shared)
    return tuple(kernels.values())


_SHARED, _PTX = 3, 4  # fields of jaxlib's TritonKernel message


def _assemble(ptx: str) -> tuple[Kernel, ...]:
    (architecture,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [_assembler(), "-v", f"-arch={architecture}", "-o", f"{source}.cubin", source]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return _parse_ptxas(done.stderr)


def _parse_ptxas(report: str) -> tuple[Kernel, ...]:
    kernel = (
        r"Function properties for (\w+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads\n"
    )
    found = re.findall(kernel + r".*?Used (\d+) registers", report, re.DOTALL)
    return tuple(Kernel(f[0], int(f[3]), int(f[1]) + int(f[2]), None) for f in found)


def _assembler() -> pathlib.Path:
    """The ptxas that comes with triton, so that the numbers are the same on every machine."""
    folder = importlib.util.find_spec("triton").submodule_search_locations[0]
    return pathlib.Path(folder) / "backends" / "nvidia" / "bin" / "ptxas"


@contextlib.contextmanager
def _assembler_on_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(_assembler().parent), prepend=os.pathsep)
        yield


@contextlib.contextmanager
def _mosaic_reports() -> Iterator[pathlib.Path]:
    """Yields a file that holds, afterwards, what ptxas said of Mosaic GPU kernels: their compiler
    prints it to the process's output, below Python's."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
        path = pathlib.Path(folder) / "ptxas.txt"
        sys.stdout.flush()
        output = os.dup(1)
        with path.open("wb") as file:
            os.dup2(file.fileno(), 1)
        try:
            yield path
        finally:
            sys.stdout.flush()
            os.dup2(output, 1)
            os.close(output)


def _custom_calls(lowered: Any, name: str) -> Iterator[bytes]:
    """The backend configs of the custom calls of that name."""

    def walk(operation: Any) -> Iterator[bytes]:
        attributes = operation.attributes
        called = operation.name == "stablehlo.custom_call"
        if called and attributes["call_target_name"].value == name:
            yield attributes["backend_config"].value_bytes
        for region in operation.regions:
            for block in region:
                for inner in block:
                    yield from walk(inner.operation)

    yield from walk(lowered.compiler_ir("stablehlo").operation)


def _fields(message: bytes) -> dict[int, list[Any]]:
    """Field numbers and values of a protocol buffer whose schema jaxlib does not export."""
    fields: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            value: Any = varint()
        else:
            size = {1: 8, 5: 4}.get(wire) or varint()
            value = message[at : at + size]
            at += size
        fields.setdefault(number, []).append(value)
    return fields
