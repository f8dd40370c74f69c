# SPDX-License-Identifier: Apache-2.0
"""What all TPU implementations ask of the place that they are traced for."""

import jax

from ops import dispatch
from pallas_kernels import tpu_interpret


def require() -> None:
    """Raises `Unsupported` unless code is traced for a TPU or for the simulation of one."""
    platform = dispatch.current_platform()
    if platform != "tpu" and tpu_interpret.current() is None:
        raise dispatch.Unsupported(f"pallas_tpu: runs on TPU (here: {platform})")


def chip() -> str | None:
    """The device kind that code is traced for, where that is known."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform == "tpu":
        return device.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else None
