# SPDX-License-Identifier: Apache-2.0
"""Compiles a whole sharded train step for a TPU topology, on a machine without a TPU."""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lm import flops, hardware, jobs, setup, sharding, train, transformer
from lm.config import Config
from lm.data.layout import EDGE_FIELDS, ROW_FIELDS
from lm.errors import RunError, UserError
from ops import dispatch


def devices_of(topology: str) -> list[Any]:
    """The devices of a TPU topology such as "v5p:4x4x4", described by libtpu."""
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"topology {topology!r} cannot be described (is libtpu installed? names look like "
            f"v5e:4x4, v5p:4x4x4, v6e:8x8): {text}"
        ) from error


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a train step is made of, in shapes alone."""

    objective: train.Objective
    trained: Any  # shapes of what a step changes
    frozen: Any  # and of what it only reads
    batch: Mapping[str, jax.ShapeDtypeStruct]
    flops: float  # model FLOPs of a step


# of a config with everything resolved, on a mesh
Problems = Callable[[setup.Setup, sharding.Sharding], Problem]


def edges(resolved: setup.Setup, mesh: sharding.Sharding) -> Problem:
    """Next tokens on edges. Its FLOPs are those of rows that are chains of seq_len tokens, all
    trained."""
    config, model = resolved.config, resolved.model
    execution = jobs.execution_of(resolved, mesh)
    trained, frozen = train.partition(model, transformer.abstract(model)[1])
    size, length = config.train.batch_size, config.data.seq_len
    tokens, pairs = size * length, size * length * (length + 1) // 2
    return Problem(
        objective=train.edge_objective(model, execution, config.train.weighting),
        trained=trained,
        frozen=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), frozen),
        batch=abstract_rows(size, length),
        flops=flops.training_flops(model, tokens, tokens, pairs),
    )


def lower(
    config: Config,
    objective: train.Objective,
    trained: Any,
    frozen: Any,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: sharding.Sharding,
) -> jax.stages.Lowered:
    """The lowered train step for shapes of parameters and of a batch, placed on a mesh here."""
    options = config.train
    split = mesh.size("batch") * options.accumulate
    if options.batch_size % split:
        raise UserError(f"train.batch_size={options.batch_size} is not a multiple of {split}")
    optimizer = train.make_optimizer(config.optimizer, max(options.steps, 1))
    step = train.make_step(objective, optimizer, options, config.model.dtype)
    state = jax.eval_shape(lambda p: train.init_state(p, optimizer, 0, None), trained)
    rows = {name: mesh.named("batch", *[None] * (x.ndim - 1)) for name, x in batch.items()}
    placed = (
        _placed(state, mesh.params(state)),
        _placed(frozen, mesh.params(frozen)),
        _placed(dict(batch), rows),
    )
    return jax.jit(step, donate_argnums=0).lower(*placed)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def abstract_rows(batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of packed rows."""
    floats = ("edge_weights", "edge_turn_weights")
    return {
        name: jax.ShapeDtypeStruct(
            (batch_size, seq_len), jnp.float32 if name in floats else jnp.int32
        )
        for name in (*ROW_FIELDS, *EDGE_FIELDS)
    }


def compile_step(config: Config, topology: str, problems: Problems = edges) -> dict[str, Any]:
    """Compiles and reports memory per chip: argument + output - alias + temporaries.

    flops_per_chip are model FLOPs, from formulas (the compiler's own count takes a scanned layer
    once).

    Raises:
      UserError: an unknown topology, or a mesh that does not fit it.
      RunError: the step needs more memory than a chip has.
    """
    devices = devices_of(topology)
    if len(devices) < 2:
        raise UserError(f"topology {topology} has one device: nothing to shard")
    began = time.monotonic()
    resolved = setup.resolve(config)
    mesh = sharding.make(config.mesh, resolved.model, devices)
    problem = problems(resolved, mesh)
    with dispatch.target_platform("tpu"):
        lowered = lower(
            config, problem.objective, problem.trained, problem.frozen, problem.batch, mesh
        )
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(f"{topology}: the step does not fit: {_used(str(error))}") from None
    seconds = time.monotonic() - began
    chip = hardware.chip(devices[0])
    if chip is None:
        raise UserError(f"no data sheet for {devices[0].device_kind}")
    return {
        "parameters": transformer.count_parameters(resolved.model),
        "chips": len(devices),
        "bytes_per_chip": hardware.compiled_bytes(compiled),
        "hbm_bytes": chip.memory,
        "flops_per_chip": problem.flops / len(devices),
        "compile_s": round(seconds, 1),
    }


def _used(text: str) -> str:
    """The compiler's own sentence about memory."""
    match = re.search(r"Used [^.]*\.[^.]*\.", text) or re.search(r"RESOURCE_EXHAUSTED:[^\n]*", text)
    return " ".join(match.group().split()) if match else "RESOURCE_EXHAUSTED"
