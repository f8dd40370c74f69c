# SPDX-License-Identifier: Apache-2.0
"""Commands. Compile-only packages for devices that this machine lacks are kept from JAX, before
anything imports it."""

import glob
import importlib.util
import os
import sys
import types


def _skip_absent_tpu() -> None:
    """libtpu may be here only to compile with; without a TPU, JAX would wait for one and
    complain."""
    tpu = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if "JAX_PLATFORMS" not in os.environ and importlib.util.find_spec("libtpu") and not tpu:
        plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
        gpu = any(importlib.util.find_spec(name) for name in plugins)
        os.environ["JAX_PLATFORMS"] = (
            "cuda,cpu" if gpu and glob.glob("/dev/nvidia[0-9]*") else "cpu"
        )


def _skip_absent_gpu() -> None:
    """The CUDA plugin may be here only to compile with; without a GPU, each of its libraries would
    complain when JAX loads it, and no setting quiets them."""
    present = any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg")))
    if present or "cuda" in os.environ.get("JAX_PLATFORMS", ""):
        return
    for version in ("12", "13"):
        sys.modules.setdefault(f"jax_cuda{version}_plugin", None)  # imports as not installed
        absent = types.ModuleType(f"jax_plugins.xla_cuda{version}")
        absent.initialize = lambda: None
        sys.modules.setdefault(absent.__name__, absent)


if "jax" not in sys.modules:  # in a program that has imported it, devices are that program's
    _skip_absent_tpu()
    _skip_absent_gpu()
