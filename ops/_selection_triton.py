# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels behind token selection require of a machine and of head dims."""

from collections.abc import Sequence

import jax

from ops import dispatch
from pallas_kernels import selection_triton_config as configs
from pallas_kernels import triton_call


def capability() -> int:
    """The compute capability that is compiled for. Raises Unsupported where no kernel runs."""
    platform = dispatch.current_platform()
    if platform != "gpu":
        raise dispatch.Unsupported(f"triton: runs on CUDA GPUs (here: {platform})")
    try:
        found = triton_call.capability()
        triton_call.require()
    except triton_call.Missing as missing:
        raise dispatch.Unsupported(f"triton: {missing}") from None
    if found < 80:
        raise dispatch.Unsupported(f"triton: compute capability {found}; 80 and later is served")
    return found


def check_types(head_dim: int, served: Sequence[str], **arrays: jax.Array) -> None:
    """Raises Unsupported for a head dim or the type of an array that no kernel knows."""
    if head_dim not in configs.HEAD_DIMS:
        known = ", ".join(map(str, configs.HEAD_DIMS))
        raise dispatch.Unsupported(f"triton: head dim {head_dim}; one of {known} is served")
    for name, array in arrays.items():
        if array.dtype.name not in served:
            raise dispatch.Unsupported(
                f"triton: {name} of type {array.dtype}; one of {', '.join(served)} is served"
            )
