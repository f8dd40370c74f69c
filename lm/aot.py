# SPDX-License-Identifier: Apache-2.0
"""Compiles a whole sharded train step for a TPU topology, on a machine without a TPU."""

import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lm import flops, hardware, setup, sharding, train, transformer
from lm.config import Config
from lm.data.layout import EDGE_FIELDS, ROW_FIELDS
from lm.errors import RunError, UserError
from lm.losses import Execution
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


def lower_step(config: Config, devices: list[Any]) -> tuple[jax.stages.Lowered, int]:
    """The lowered train step of a config over `devices`, and the number of parameters."""
    resolved = setup.resolve(config)
    model, options = resolved.model, config.train
    mesh = sharding.make(config.mesh, model, devices)
    optimizer = train.make_optimizer(config.optimizer, max(options.steps, 1))
    execution = Execution(mesh, options.implementation or None, options.remat, resolved.valid_vocab)
    objective = train.edge_objective(model, execution, options.weighting)
    step = train.make_step(objective, optimizer, options, model.dtype)
    trained, frozen = train.partition(model, transformer.abstract(model)[1])
    state = jax.eval_shape(lambda p: train.init_state(p, optimizer, 0, None), trained)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), frozen)
    placed = (_placed(state, mesh), _placed(frozen, mesh), _batch(config, mesh))
    with dispatch.target_platform("tpu"):
        lowered = jax.jit(step, donate_argnums=0).lower(*placed)
    return lowered, transformer.count_parameters(model)


def _placed(tree: Any, mesh: sharding.Sharding) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, mesh.params(tree)
    )


def _batch(config: Config, mesh: sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (config.train.batch_size, config.data.seq_len)
    split = mesh.size("batch") * config.train.accumulate
    if shape[0] % split:
        raise UserError(f"train.batch_size={shape[0]} is not a multiple of {split}")
    placed = mesh.named("batch", None)
    floats = ("edge_weights", "edge_turn_weights")
    return {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32 if name in floats else jnp.int32, sharding=placed
        )
        for name in (*ROW_FIELDS, *EDGE_FIELDS)
    }


def compile_step(config: Config, topology: str) -> dict[str, Any]:
    """Compiles and reports memory per chip: argument + output - alias + temporaries.

    flops_per_chip are model FLOPs of a step whose rows are chains of seq_len tokens, all trained
    (the compiler's own count takes a scanned layer once).

    Raises:
      UserError: an unknown topology, or a mesh that does not fit it.
      RunError: the step needs more memory than a chip has.
    """
    devices = devices_of(topology)
    if len(devices) < 2:
        raise UserError(f"topology {topology} has one device: nothing to shard")
    began = time.monotonic()
    lowered, parameters = lower_step(config, devices)
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
    tokens = config.train.batch_size * config.data.seq_len
    pairs = config.train.batch_size * config.data.seq_len * (config.data.seq_len + 1) // 2
    total = flops.training_flops(setup.resolve(config).model, tokens, tokens, pairs)
    return {
        "parameters": parameters,
        "chips": len(devices),
        "bytes_per_chip": hardware.compiled_bytes(compiled),
        "hbm_bytes": chip.memory,
        "flops_per_chip": total / len(devices),
        "compile_s": round(seconds, 1),
    }


def _used(text: str) -> str:
    """The compiler's own sentence about memory."""
    match = re.search(r"Used [^.]*\.[^.]*\.", text) or re.search(r"RESOURCE_EXHAUSTED:[^\n]*", text)
    return " ".join(match.group().split()) if match else "RESOURCE_EXHAUSTED"
