# SPDX-License-Identifier: Apache-2.0
"""How the next token is drawn from logits; draft and target distributions share the code."""

import jax
import jax.numpy as jnp

from lm.config import SamplingConfig


def is_greedy(sampling: SamplingConfig) -> bool:
    """Whether the draw is the argmax: temperature 0, or one that float32 cannot divide by."""
    return sampling.temperature < float(jnp.finfo(jnp.float32).tiny)


def filtered_logits(
    logits: jax.Array,  # [..., V]
    sampling: SamplingConfig,
    valid_vocab: int | None = None,
) -> jax.Array:
    """Unnormalised float32 log-weights [..., V] of what is drawn from, -inf where excluded.

    In this order: tokens from `valid_vocab` on (padding of the embedding table) are excluded;
    logits are divided by the temperature; the `top_k` largest stay; of those, renormalised, the
    smallest set of most likely tokens whose mass reaches `top_p` stays, and the most likely one
    always. Among equal logits the lowest index goes first. Greedy sampling gives 0 for the argmax
    and -inf for the rest.
    """
    logits = masked_logits(logits, valid_vocab)
    size = logits.shape[-1]
    if is_greedy(sampling):
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(_token_ids(logits) == best, 0.0, -jnp.inf)
    # the maximum goes first, so that a tiny temperature underflows instead of overflowing
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1.0:
        return logits
    values, indices = jax.lax.top_k(logits, min(sampling.top_k or size, size))
    if sampling.top_p < 1.0:
        mass = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(mass, axis=-1) - mass  # of the tokens that are more likely
        values = jnp.where(before < sampling.top_p, values, -jnp.inf)
    nothing = jnp.full_like(logits, -jnp.inf)
    return jnp.put_along_axis(nothing, indices, values, axis=-1, inplace=False)


def log_probs(
    logits: jax.Array,  # [..., V]
    sampling: SamplingConfig,
    valid_vocab: int | None = None,
) -> jax.Array:
    """Log-probabilities [..., V] float32 of the distribution that is drawn from; they sum to 1."""
    return jax.nn.log_softmax(filtered_logits(logits, sampling, valid_vocab), axis=-1)


def sample(
    logits: jax.Array,  # [B, V]
    sampling: SamplingConfig,
    key: jax.Array,  # [] or [B] keys
    valid_vocab: int | None = None,
) -> jax.Array:
    """One token for each row, [B] int32. With a key for each row, draws are independent of B."""
    filtered = filtered_logits(logits, sampling, valid_vocab)
    if is_greedy(sampling):
        return jnp.argmax(filtered, axis=-1).astype(jnp.int32)
    draw = jax.random.categorical if key.ndim == 0 else jax.vmap(jax.random.categorical)
    return draw(key, filtered).astype(jnp.int32)


def masked_logits(logits: jax.Array, valid_vocab: int | None) -> jax.Array:
    """Float32 logits [..., V] with -inf from token `valid_vocab` on; None: all tokens are real."""
    logits = logits.astype(jnp.float32)
    if valid_vocab is None or valid_vocab >= logits.shape[-1]:
        return logits
    return jnp.where(_token_ids(logits) < valid_vocab, logits, -jnp.inf)


def _token_ids(logits: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
