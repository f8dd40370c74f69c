# SPDX-License-Identifier: Apache-2.0
"""Which drafted tokens are kept, so that what is emitted has exactly the model's law.

Speculative sampling (arXiv 2211.17192, 2302.01318), in float32 and with the very q that the tokens
were drawn from: token x is kept with probability min(1, p(x) / q(x)); the first that is not is
replaced by a draw from max(p - q, 0), normalised, and ends the draft; a draft that is kept whole is
followed by a draw from p. Several chains from one root are tested in turn against what is left of p
(recursive residuals, arXiv 2305.09781). Nothing is drawn here: uniform numbers come in, and out go
the law of the replacement and the probability of every decision, so that all outcomes can be
enumerated (`verify`).
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verdict:
    """The tokens that are kept and the law of the one that follows them."""

    accepted: jax.Array  # [B] int32, 0..n
    chain: jax.Array  # [B] int32, the chain whose tokens they are
    log_next: jax.Array  # [B, V] float32, normalised
    keep: jax.Array  # [B, C, n] with which probability each was to be kept; 1 where not tested


def keep_probability(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """min(1, p / q) of drafted tokens; a token is kept when its uniform number is below it."""
    return jnp.minimum(jnp.exp(log_p - log_q), 1.0)


def residual(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Normalised log max(p - q, 0), [..., V].

    p itself where nothing is left, which rounding alone can bring about: p <= q everywhere means
    p = q, and then no token is ever replaced.
    """
    left = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0)
    total = jnp.sum(left, axis=-1, keepdims=True)
    normalised = jnp.log(left) - jnp.log(jnp.where(total > 0, total, 1.0))
    return jnp.where(total > 0, normalised, log_p)


def chain(
    tokens: jax.Array,  # [B, n] int32
    log_q: jax.Array,  # [B, n, V]
    log_p: jax.Array,  # [B, n + 1, V], after the last token and after each of `tokens`
    uniforms: jax.Array,  # [B, n]
) -> Verdict:
    """Tests one chain per sequence."""
    B, n = tokens.shape
    nothing = jnp.full((B, 1, log_p.shape[-1]), -jnp.inf, jnp.float32)
    keep = keep_probability(_at(log_p[:, :n], tokens), _at(log_q, tokens))
    passed = jnp.cumprod(uniforms < keep, axis=1, dtype=jnp.int32)
    accepted = jnp.sum(passed, axis=1, dtype=jnp.int32)
    tested = jnp.arange(n, dtype=jnp.int32)[None] <= accepted[:, None]
    # past the last drafted token q is nothing, and what is left of p is p
    log_q = jnp.concatenate([log_q, nothing], axis=1)
    left = residual(_row(log_p, accepted), _row(log_q, accepted))
    whole = (accepted == n)[:, None]
    log_next = jnp.where(whole, _row(log_p, accepted), left)
    keep = jnp.where(tested, keep, 1.0)[:, None]
    return Verdict(accepted, jnp.zeros_like(accepted), log_next, keep)


def chain_greedy(tokens: jax.Array, best: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, n] against the argmax [B, n + 1] of every row: (accepted [B], the next token
    [B])."""
    kept = tokens == best[:, :-1]
    accepted = jnp.sum(jnp.cumprod(kept, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    return accepted, jnp.take_along_axis(best, accepted[:, None], axis=1)[:, 0]


def tree(
    tokens: jax.Array,  # [B, C, n] int32
    log_q: jax.Array,  # [B, C, n, V]
    log_p: jax.Array,  # [B, 1 + C n, V]: the root's row, then those of each chain
    uniforms: jax.Array,  # [B, C, n]
) -> Verdict:
    """Tests C chains per sequence, level by level.

    At every level all chains that agree with what was kept so far are candidates, each drawn from
    its own q whatever became of the others; the first that passes against what is left of p moves
    the walk on.
    """
    B, C, n = tokens.shape
    alive = jnp.ones((B, C), bool)
    going = jnp.ones(B, bool)
    accepted = jnp.zeros(B, jnp.int32)
    log_next = log_p[:, 0]
    leader = jnp.zeros(B, jnp.int32)
    probabilities = []
    for level in range(n):
        moved = jnp.zeros(B, bool)
        token = jnp.zeros(B, jnp.int32)
        left = log_next
        for index in range(C):
            candidate, law = tokens[:, index, level], log_q[:, index, level]
            tested = going & alive[:, index] & ~moved
            keep = keep_probability(_at(left, candidate), _at(law, candidate))
            probabilities.append(jnp.where(tested, keep, 1.0))
            passes = uniforms[:, index, level] < keep
            taken = tested & passes
            left = jnp.where((tested & ~passes)[:, None], residual(left, law), left)
            token = jnp.where(taken, candidate, token)
            moved = moved | taken
        alive = jnp.where(moved[:, None], alive & (tokens[:, :, level] == token[:, None]), alive)
        leader = jnp.argmax(alive, axis=1).astype(jnp.int32)
        after = _row(log_p, 1 + leader * n + level)
        log_next = jnp.where(moved[:, None], after, left)
        accepted = accepted + moved
        going = moved
    keep = jnp.stack(probabilities, axis=1).reshape(B, n, C)
    return Verdict(accepted, leader, log_next, jnp.swapaxes(keep, 1, 2))


def tree_greedy(tokens: jax.Array, best: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The longest of the chains [B, C, n] that follows the argmax `best` [B, 1 + C n] of its rows:
    (accepted [B], chain [B], the next token [B])."""
    B, C, n = tokens.shape
    own = best[:, 1:].reshape(B, C, n)
    root = jnp.broadcast_to(best[:, :1, None], (B, C, 1))
    kept = tokens == jnp.concatenate([root, own[:, :, :-1]], axis=2)
    lengths = jnp.sum(jnp.cumprod(kept, axis=2, dtype=jnp.int32), axis=2, dtype=jnp.int32)
    leader = jnp.argmax(lengths, axis=1).astype(jnp.int32)
    accepted = jnp.max(lengths, axis=1)
    row = path_rows(leader, accepted[:, None], n)
    return accepted, leader, jnp.take_along_axis(best, row, axis=1)[:, 0]


def path_rows(chain: jax.Array, depth: jax.Array, n: int) -> jax.Array:
    """The rows [B, ...] of a tree's tokens at `depth` [B, ...] of chain [B]; depth 0 is the
    root."""
    chain = jnp.expand_dims(chain, tuple(range(1, depth.ndim)))
    return jnp.where(depth == 0, 0, chain * n + depth)


def _at(laws: jax.Array, tokens: jax.Array) -> jax.Array:
    """laws [..., V] at tokens [...]."""
    return jnp.take_along_axis(laws, tokens[..., None], axis=-1)[..., 0]


def _row(laws: jax.Array, rows: jax.Array) -> jax.Array:
    """laws [B, T, V] at row [B], as [B, V]."""
    return jnp.take_along_axis(laws, rows[:, None, None], axis=1)[:, 0]
