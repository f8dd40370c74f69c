# SPDX-License-Identifier: Apache-2.0
"""The training step: one pure jitted function from state and batch to state and metrics."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import losses, transformer
from lm.config import ModelConfig, OptimizerConfig, TrainConfig
from lm.sharding import Sharding

Params = transformer.Params
Metrics = dict[str, jax.Array]
# (params, microbatch, key) -> (sum of weight * log-probability, sums for the metrics);
# the sums hold `weight`, by which the total over all microbatches is divided.
Objective = Callable[[Params, losses.Batch, jax.Array], tuple[jax.Array, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. Parameters are float32 masters."""

    step: jax.Array  # [] int32, optimiser steps taken
    params: Params  # the trained ones
    opt_state: Any
    key: jax.Array  # [2] uint32


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW; weight decay on matrices only, never on norms and biases."""
    decay_steps = max(total_steps - config.warmup_steps, 1)
    peak = config.learning_rate
    final = peak * config.final_fraction
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, final, decay_steps),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    schedule = optax.join_schedules([warmup, decay], [config.warmup_steps])
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, adamw)


def _decayed(params: Params) -> Any:
    """True for matrices and tables: by name, since layers are stacked and shapes mislead."""
    names = {"kernel", "table", "lora_a", "lora_b", "down", "up"}
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


def partition(config: ModelConfig, params: Params) -> tuple[Params, Params]:
    """(trained, frozen): everything and nothing, or with LoRA the adapters and the rest."""
    if not config.lora.rank:
        return params, {}
    return (
        _select(params, lambda name: name.startswith("lora_")),
        _select(params, lambda name: not name.startswith("lora_")),
    )


def _select(tree: Params, keep: Callable[[str], bool]) -> Params:
    out = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            value = _select(value, keep)
            if value:
                out[name] = value
        elif keep(name):
            out[name] = value
    return out


def merge(first: Params, second: Params) -> Params:
    """The union of two nested dicts with disjoint leaves."""
    out = dict(first)
    for name, value in second.items():
        out[name] = merge(out[name], value) if name in out else value
    return out


def init_state(
    params: Params, optimizer: optax.GradientTransformation, seed: int, sharding: Sharding | None
) -> TrainState:
    """A state at step 0; `params` are the trained ones, placed on the mesh here."""

    def build(params):
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            key=jax.random.key_data(jax.random.key(seed)),
        )

    out = None if sharding is None else sharding.params(jax.eval_shape(build, params))
    return jax.jit(build, out_shardings=out)(params)


def edge_objective(model: ModelConfig, execution: losses.Execution, weighting: str) -> Objective:
    """Next-token loss on explicit edges: what single-pass and every plain fine-tuning trains."""

    def objective(params, batch, key):
        del key  # nothing is drawn
        total, log_probs = losses.weighted_log_prob(model, params, batch, execution, weighting)
        sums = losses.normalised(batch, log_probs)
        sums["weight"] = sums[f"weight_{weighting}"]
        return total, sums

    return objective


def cast(params: Params, compute_dtype: str) -> Params:
    """Master parameters as they are computed with: once, outside the layer scan, so that with fsdp
    the gathers move `compute_dtype`."""
    return jax.tree.map(lambda x: x.astype(compute_dtype), params)


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    compute_dtype: str,
) -> Callable[[TrainState, Params, losses.Batch], tuple[TrainState, Metrics]]:
    """The pure step. `frozen` parameters are passed beside the state and never change."""

    def step(state: TrainState, frozen: Params, batch: losses.Batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def negative(params, micro, key):
            total, sums = objective(merge(cast(params, compute_dtype), frozen), micro, key)
            return -total, sums

        grads, sums = _accumulate(
            jax.grad(negative, has_aux=True), state.params, batch, key, config.accumulate
        )
        weight = jnp.maximum(sums.pop("weight"), jnp.finfo(jnp.float32).tiny)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = sums | {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step


def _accumulate(grad_fn, params, batch, key, count):
    """Float32 sums of gradients and metrics over `count` microbatches."""
    if count == 1:
        grads, sums = grad_fn(params, batch, key)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums

    def split(x):  # microbatch m takes rows m, m + count, ...: every device keeps its own rows
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    def body(carry, xs):
        index, micro = xs
        out = grad_fn(params, micro, jax.random.fold_in(key, index))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, out), None

    micros = jax.tree.map(split, dict(batch))
    shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], micros), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    return jax.lax.scan(body, zeros, (jnp.arange(count), micros))[0]


def to_device(batch: Mapping[str, np.ndarray], sharding: Sharding | None) -> losses.Batch:
    """A host's rows as (global) arrays split over the batch axes."""
    if sharding is None:
        return jax.device_put(dict(batch))
    return {
        name: jax.make_array_from_process_local_data(
            sharding.named("batch", *[None] * (x.ndim - 1)), x
        )
        for name, x in batch.items()
    }


def mean_losses(sums: Mapping[str, Any]) -> dict[str, float]:
    """`loss_per_token` and `loss_per_turn` in nats, from the sums of `losses.normalised`."""
    out = {}
    for weighting in losses.WEIGHTS:
        weight = float(sums[f"weight_{weighting}"])
        loss = float(sums[f"loss_{weighting}"])
        out[f"loss_{weighting}"] = loss / weight if weight else math.nan
    return out


def params_sha256(params: Params) -> str:
    """A digest of every parameter's path, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
