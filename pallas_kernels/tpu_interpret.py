# SPDX-License-Identifier: Apache-2.0
"""Runs the TPU kernels on a machine without a TPU, in Pallas' simulation of one, for tests."""

import jax
from jax.experimental.pallas import tpu as pltpu

# Part of jit's cache key, so what was traced for a chip is traced again for the simulation.
_params = jax.make_user_context(None)


def simulated(params: pltpu.InterpretParams):
    """Context manager: kernels traced inside run in `pltpu`'s interpreter with these parameters."""
    return _params(params)


def current() -> pltpu.InterpretParams | None:
    """What to pass to `pl.pallas_call(interpret=)`; None outside `simulated`."""
    return _params.value
