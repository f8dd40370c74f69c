# SPDX-License-Identifier: Apache-2.0
"""Peak rates and memory of the chips that Skim plans for, from the vendors' data sheets."""

import dataclasses

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them."""

    flops: float  # dense bf16 per second
    bandwidth: float  # bytes per second to device memory
    memory: int  # bytes of device memory


CHIPS = {
    "TPU v5 lite": Chip(197e12, 819e9, 16 * GIB),
    "TPU v5": Chip(459e12, 2765e9, 95 * GIB),
    "TPU v6 lite": Chip(918e12, 1640e9, 32 * GIB),
    "TPU7x": Chip(1153e12, 3690e9, 96 * GIB),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3350e9, 80 * GIB),
    "NVIDIA H200": Chip(989e12, 4800e9, 141 * GIB),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2039e9, 80 * GIB),
}


def chip(device: jax.Device | None = None) -> Chip | None:
    """The data sheet of a device (default: the first), or None for one that is not listed."""
    device = jax.devices()[0] if device is None else device
    return CHIPS.get(device.device_kind)


def compiled_bytes(compiled: jax.stages.Compiled) -> int:
    """Device memory of a compiled program: argument + output - alias + temporaries, per device."""
    stats = compiled.memory_analysis()
    return int(
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
