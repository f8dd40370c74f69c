# SPDX-License-Identifier: Apache-2.0
"""The one place that calls jax-triton: Triton kernels as functions of JAX arrays.

jax-triton needs a CUDA build of jaxlib to import at all, and asks a device for its architecture
unless told: both are kept away from machines without a GPU, where kernels still compile ahead of
time.
"""

import functools
import importlib
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

# Part of jit's cache key, so that a function lowered for one architecture is lowered again for
# another.
_target_capability = jax.make_user_context(None)


class Missing(Exception):
    """Triton kernels cannot be compiled here; the message says what is missing."""


def target_capability(capability: int) -> Any:
    """Context manager: compile kernels for this compute capability (80, 90), whatever this machine
    is."""
    return _target_capability(capability)


def capability() -> int:
    """The compute capability that kernels are compiled for, as 10 * major + minor.

    Raises Missing without a CUDA GPU and outside `target_capability`.
    """
    if _target_capability.value is not None:
        return _target_capability.value
    reported = getattr(jax.devices()[0], "compute_capability", None)
    try:
        major, minor = str(reported).split(".")
        return 10 * int(major) + int(minor)
    except ValueError:
        raise Missing(f"no CUDA GPU (here: {jax.devices()[0].device_kind})") from None


@functools.cache
def require() -> tuple[types.ModuleType, types.ModuleType]:
    """The modules `triton` and `jax_triton`. Raises Missing with the reason when one does not
    import."""
    modules = []
    for name in ("triton", "jax_triton"):
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            reason = " ".join(str(error).split())[:120]
            raise Missing(f"{name} does not import ({reason})") from error
    return modules[0], modules[1]


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter instead of being compiled."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_call(
    kernel: Any,
    *args: jax.Array | int | np.float32,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    capability: int,
    name: str,
    input_output_aliases: Mapping[int, int] | None = None,
    zeroed_outputs: Sequence[int] = (),
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Launches a `triton.jit` kernel on `grid` with the arguments, then pointers to the outputs.

    Scalars of type float are refused, because jax-triton would pass them as float64.
    `input_output_aliases` maps an array among the arguments, counted without scalars, to the output
    that is written over it; `zeroed_outputs` hold zeros at the start. `constants` are the kernel's
    constexpr parameters. Neither differentiable nor batchable by itself.
    """
    if any(
        isinstance(argument, float) and not isinstance(argument, np.float32) for argument in args
    ):
        raise TypeError(f"{name}: pass floats as np.float32")
    _, jax_triton = require()
    call: Callable[..., Any] = jax_triton.triton_call
    return tuple(
        call(
            *args,
            kernel=kernel,
            out_shape=list(out_shape),
            grid=grid,
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=capability,
            name=name,
            input_output_aliases=dict(input_output_aliases or {}),
            zeroed_outputs=tuple(zeroed_outputs),
            **constants,
        )
    )
