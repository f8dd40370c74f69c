# SPDX-License-Identifier: Apache-2.0
"""A strict world for every test: four CPU devices, no silent rank promotion, full precision."""

import os
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute. Legacy emitters and one module per program compile three
# times faster than kernels that are each lowered through MLIR; later XLAs have no legacy emitters,
# and end on flags that they do not know.
_LEGACY_EMITTERS = ("--xla_cpu_use_fusion_emitters=false",)
QUICK_COMPILE = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        *(_LEGACY_EMITTERS if metadata.version("jaxlib").startswith("0.10.") else ()),
    )
)
_FLAGS = (
    os.environ.get("XLA_FLAGS", ""),
    QUICK_COMPILE,
    "--xla_force_host_platform_device_count=4",
)
os.environ["XLA_FLAGS"] = " ".join(_FLAGS)
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # workers compile for TPUs side by side

import atexit
import gc
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" not in os.environ:
    # compiled programs and prepared data are shared by this session's workers and commands
    _SHARED = tempfile.mkdtemp(prefix="skim-tests-")
    atexit.register(shutil.rmtree, _SHARED, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_SHARED}/xla"
    os.environ["SKIM_CACHE"] = f"{_SHARED}/data"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

# the CUDA plugin's libraries, here to compile with, all say that there is no GPU
_STDERR = os.dup(2)
with open(os.devnull, "w") as nowhere:
    os.dup2(nowhere.fileno(), 2)
import jax

os.dup2(_STDERR, 2)
os.close(_STDERR)
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Every compiled program maps memory, and Linux ends a process that has 65,530 mappings.
_MOST_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """A worker that has gone through many files drops the programs of those behind it."""
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


# the longest files start first, so that two workers end together
_FIRST = ("tests/test_compile.py", "tests/test_notebooks.py", "tests/lm/test_resume.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(_FIRST))
