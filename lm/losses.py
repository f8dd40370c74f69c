# SPDX-License-Identifier: Apache-2.0
"""The loss on edges: row r predicts token t with weight w. Rows that train nothing never meet the
unembedding."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm import contexts, layers, transformer
from lm.config import ModelConfig
from lm.sharding import Sharding
from ops.linear_log_prob import linear_log_prob
from ops.visibility import Visibility

Batch = Mapping[str, jax.Array]
WEIGHTS = {"per_token": "edge_weights", "per_turn": "edge_turn_weights"}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a forward pass is carried out, as opposed to what it computes."""

    sharding: Sharding | None = None
    implementation: str | None = None
    remat: str = "none"
    valid_vocab: int | None = None  # tokens beyond it are padding of the embedding table


def visibility_of(batch: Batch) -> Visibility:
    """The `Visibility` that a batch of rows states: `until`, and hidden runs where the layout has
    them."""
    return Visibility(
        until=batch["until"],
        hidden_from=batch.get("hidden_from"),
        hidden_until=batch.get("hidden_until"),
    )


def forward(
    config: ModelConfig, params: transformer.Params, batch: Batch, execution: Execution
) -> jax.Array:
    """Hidden states [B, S, D] of packed rows."""
    context = contexts.Training(visibility_of(batch), execution.sharding, execution.implementation)
    states, _ = transformer.hidden(
        config, params, batch["tokens"], batch["positions"], context, remat=execution.remat
    )
    return states


def edge_log_probs(
    config: ModelConfig, params: transformer.Params, batch: Batch, execution: Execution
) -> jax.Array:
    """Log-probability of each edge's target, [B, E] float32; 0 on padding edges."""
    states = forward(config, params, batch, execution)
    return log_probs_of(config, params, states, batch, None, execution)


def weighted_log_prob(
    config: ModelConfig,
    params: transformer.Params,
    batch: Batch,
    execution: Execution,
    weighting: str = "per_token",
) -> tuple[jax.Array, jax.Array]:
    """sum over edges of weight * log-probability (differentiable), and [B, E] log-probabilities
    (not)."""
    states = forward(config, params, batch, execution)
    return log_probs_of(config, params, states, batch, batch[WEIGHTS[weighting]], execution)


def log_probs_of(
    config: ModelConfig,
    params: transformer.Params,
    states: jax.Array,  # [B, S, D]
    batch: Batch,
    weights: jax.Array | None,  # [B, E]
    execution: Execution,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The edges' targets under the states of their rows; returns as `sharded_log_prob`."""
    with jax.named_scope("edges"):
        x = jax.vmap(layers.lookup)(states, batch["edge_rows"])  # [B, E, D]
        table = transformer.unembedding(config, params).astype(x.dtype)
    return sharded_log_prob(
        x, table, batch["edge_targets"], weights, execution, config.logit_softcap
    )


def sharded_log_prob(
    x: jax.Array,  # [B, E, D]
    table: jax.Array,  # [V, D]
    targets: jax.Array,  # [B, E] int32
    weights: jax.Array | None,  # [B, E]
    execution: Execution,
    softcap: float | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`linear_log_prob` of every row, batch and vocabulary split over the mesh.

    Returns what the op returns: log-probabilities [B, E], or with weights their total and them.
    """
    sharding = execution.sharding
    tensor = None
    if sharding is not None and sharding.size("vocab") > 1:
        (tensor,) = sharding.axes("vocab")

    def local(x, table, targets, weights):
        out = linear_log_prob(
            x.reshape(-1, x.shape[-1]),
            table,
            targets.reshape(-1),
            None if weights is None else weights.reshape(-1),
            softcap=softcap,
            valid_vocab=execution.valid_vocab,
            vocab_axis=tensor,
            implementation=execution.implementation,
        )
        if weights is None:
            return out.reshape(targets.shape)
        total, log_prob = out
        if sharding is not None:
            total = jax.lax.psum(total, sharding.axes("batch"))
        return total, log_prob.reshape(targets.shape)

    arguments = (x, table, targets, weights)
    if sharding is None:
        return local(*arguments)
    rows = sharding.spec("batch", None)
    specs = (sharding.spec("batch", None, None), P(tensor, None), rows, rows)
    if weights is None:
        specs = (*specs[:3], None)
    return sharding.shard_map(local, specs, rows if weights is None else (P(), rows))(*arguments)


def normalised(batch: Batch, log_probs: jax.Array) -> dict[str, jax.Array]:
    """Sums of loss and weight under both normalisations, each a float32 scalar.

    `loss_<weighting>` / `weight_<weighting>` is the mean; sums are kept so that microbatches and
    hosts add up.
    """
    sums = {}
    for weighting, field in WEIGHTS.items():
        sums[f"loss_{weighting}"] = -jnp.sum(batch[field] * log_probs)
        sums[f"weight_{weighting}"] = jnp.sum(batch[field])
    return sums
