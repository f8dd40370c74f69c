# SPDX-License-Identifier: Apache-2.0
"""Per-row log-probability of a target under softmax(x w^T), without keeping the [rows, vocabulary]
array."""

import jax
import jax.numpy as jnp

from ops import (
    _linear_log_prob_reference,
    _linear_log_prob_tpu,
    _linear_log_prob_triton,
    _linear_log_prob_xla,
    dispatch,
)


def linear_log_prob(
    x: jax.Array,  # [R, D]
    w: jax.Array,  # [V, D], or the local rows of it under vocab_axis
    targets: jax.Array,  # [R] int32
    weights: jax.Array | None = None,  # [R]
    softcap: float | None = None,
    valid_vocab: int | None = None,
    *,
    vocab_axis: str | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """log softmax(cap(x w^T))[targets] per row, in float32, differentiable in x, w and weights.

    A row with a negative target is padding: its log-probability is 0 and it passes no gradient. A
    target that is not a valid column (>= V or >= valid_vocab) has log-probability -inf; nothing
    outside w is read.

    The loop over chunks of rows cannot be partitioned by the compiler: where rows are sharded, call
    this inside `jax.shard_map`.

    Args:
      x, w: floating point. Products accumulate in float32; the gradient of w is summed over rows in
        float32 and returned in w.dtype.
      weights: with weights the result is the weighted sum, the form that costs least to train:
        "xla" and "triton" then make the gradients of x and w in the same pass as the value (three
        products), instead of recomputing the logits (four).
      softcap: logits become softcap * tanh(logits / softcap).
      valid_vocab: columns from valid_vocab on (padding of the table) are excluded from the softmax.
      vocab_axis: the mesh axis over which the rows of w are split, inside `jax.shard_map`; targets
        and valid_vocab stay global. Differentiate outside the shard_map, or inside one that checks
        varying axes (the default).
      implementation: a name from `dispatch.IMPLEMENTATIONS`. "reference" keeps the logits; "xla"
        and "triton" keep those of a chunk of rows and skip chunks that are all padding;
        "pallas_tpu" keeps none and takes four products for either form.

    Returns:
      Without weights, log_prob [R] float32. With weights, (total, log_prob): the float32 scalar
      sum(weights * log_prob), where a row of weight 0 adds 0 even if its target is impossible, and
      log_prob [R] without gradient. Gradients flow through total, to weights as well. Under
      shard_map with sharded rows total is the sum of the local rows.

    Raises:
      ValueError: shapes or settings that do not fit together.
      dispatch.Unsupported: the named implementation cannot serve the call.
    """
    _check(x, w, targets, weights, softcap, valid_vocab, vocab_axis)
    log_prob = dispatch.dispatch(
        "linear_log_prob",
        implementation,
        {
            "reference": _linear_log_prob_reference.linear_log_prob,
            "xla": _linear_log_prob_xla.linear_log_prob,
            "pallas_tpu": _linear_log_prob_tpu.linear_log_prob,
            "triton": _linear_log_prob_triton.linear_log_prob,
        },
        x,
        w,
        targets.astype(jnp.int32),
        None if weights is None else weights.astype(jnp.float32),
        softcap=None if softcap is None else float(softcap),
        valid_vocab=valid_vocab,
        vocab_axis=vocab_axis,
    )
    if weights is None:
        return log_prob
    total, log_prob = log_prob
    return total, jax.lax.stop_gradient(log_prob)


def _check(x, w, targets, weights, softcap, valid_vocab, vocab_axis) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or 0 in x.shape or 0 in w.shape:
        raise ValueError(f"x [R, D] and w [V, D] do not fit together: {x.shape} and {w.shape}")
    for name, array in (("x", x), ("w", w)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {array.dtype}")
    if targets.shape != x.shape[:1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets must be {x.shape[:1]} integers, got {targets.shape} {targets.dtype}"
        )
    if weights is not None and weights.shape != x.shape[:1]:
        raise ValueError(f"weights must have shape {x.shape[:1]}, got {weights.shape}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    vocab = w.shape[0] * (1 if vocab_axis is None else jax.lax.axis_size(vocab_axis))
    if valid_vocab is not None and not 1 <= valid_vocab <= vocab:
        raise ValueError(f"valid_vocab must be between 1 and {vocab}, got {valid_vocab}")
