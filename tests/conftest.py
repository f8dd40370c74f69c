# SPDX-License-Identifier: Apache-2.0
"""A strict world for every test: four CPU devices, no silent rank promotion, full matmul
precision."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import tempfile

# compiled programs are shared by the tests of one session, and by the commands that they start
_CACHE = tempfile.TemporaryDirectory(prefix="skim-xla-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="session")
def _skim_cache(tmp_path_factory):
    """Prepared data sets go to a directory of this session."""
    os.environ["SKIM_CACHE"] = str(tmp_path_factory.mktemp("skim-cache"))
