# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities from the whole [R, V] array of logits, and the arithmetic that every
implementation shares."""

import jax
import jax.numpy as jnp


def linear_log_prob(
    x: jax.Array,  # [R, D]
    w: jax.Array,  # [V, D]
    targets: jax.Array,  # [R] int32
    weights: jax.Array | None,  # [R] float32
    *,
    softcap: float | None,
    valid_vocab: int | None,
    vocab_axis: str | None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    first = first_column(w, vocab_axis)
    logits = x.astype(jnp.float32) @ w.astype(jnp.float32).T
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    columns = first + jnp.arange(w.shape[0], dtype=jnp.int32)[None, :]
    if valid_vocab is not None:
        logits = jnp.where(columns < valid_vocab, logits, -jnp.inf)
    is_target = columns == targets[:, None]
    target_logit = jnp.sum(logits, axis=1, where=is_target)
    target_logit = jnp.where(jnp.any(is_target, axis=1), target_logit, -jnp.inf)
    log_prob = combine(_logsumexp(logits), target_logit, targets, vocab_axis)
    return log_prob if weights is None else (weighted_total(weights, log_prob), log_prob)


def _logsumexp(logits: jax.Array) -> jax.Array:
    """Over columns; -inf with zero gradients where every column is -inf (a shard of padding
    columns)."""
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=1))
    some = largest > -jnp.inf
    base = jnp.where(some, largest, 0.0)
    total = jnp.sum(jnp.exp(logits - base[:, None]), axis=1)
    return jnp.where(some, base + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)


def first_column(w: jax.Array, vocab_axis: str | None) -> jax.Array:
    """Global index of the first row of this device's w."""
    shard = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis)
    return jnp.asarray(shard * w.shape[0], jnp.int32)


def combine(
    lse: jax.Array,  # [R] over this device's columns
    target_logit: jax.Array,  # [R] -inf where the target is no valid column of this device
    targets: jax.Array,  # [R]
    vocab_axis: str | None,
) -> jax.Array:  # [R]
    """Log-probability from the parts of each vocabulary shard; 0 without gradient for padding
    rows."""
    if vocab_axis is not None:
        largest = jax.lax.pmax(jax.lax.stop_gradient(lse), vocab_axis)
        lse = largest + jnp.log(jax.lax.psum(jnp.exp(lse - largest), vocab_axis))
        here = target_logit > -jnp.inf
        found = jax.lax.psum(here.astype(jnp.int32), vocab_axis) > 0
        target_logit = jax.lax.psum(jnp.where(here, target_logit, 0.0), vocab_axis)
        target_logit = jnp.where(found, target_logit, -jnp.inf)
    return jnp.where(targets < 0, 0.0, target_logit - lse)


def weighted_total(weights: jax.Array, log_prob: jax.Array) -> jax.Array:
    """sum(weights * log_prob)."""
    return jnp.sum(weights * countable(weights, log_prob))


def countable(weights: jax.Array, log_prob: jax.Array) -> jax.Array:
    """log_prob, with 0 where a row of weight 0 has an impossible target: it must not turn the total
    into NaN."""
    return jnp.where((weights == 0) & (log_prob == -jnp.inf), 0.0, log_prob)
