# SPDX-License-Identifier: Apache-2.0
"""What a head would accept, from teacher forcing alone: no decoder runs.

Under speculative sampling a token x that the target p draws is kept from the draft q with
probability min(1, q(x) / p(x)), so on text that was drawn from the target

    E[accepted] = sum_s E_x [ prod_{j<s} min(1, q_j / p_j) * sum_v min(p_s, q_s) ]

at one position. A decoder does not start its cycles at every position alike: where the last one was
cut short, drafting is harder. `walk` therefore follows the cycles along the text: from a cycle's
start, token x_s goes on with probability min(1, q_s / p_s) and else is the correction that ends
the cycle. Both are expectations over the coins of verification, not draws of them.

Positions follow decoding: a cycle starts at a row whose next token is already known; factor 0
conditions on that token, factors 1..P-1 draft. One measurement of P factors serves every shorter
draft, since the first factors of a head do not depend on the later ones.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import contexts, transformer
from lm import sampling as draws
from lm.config import ModelConfig, SamplingConfig
from lm.cp_heads import draft
from lm.cp_heads.head import HeadConfig, HeadParams
from ops.visibility import Visibility

_CHUNK_BYTES = 256 << 20  # float32 of a chunk of positions times the vocabulary


class Steps(NamedTuple):
    """A head along given tokens, for step s of the cycle that starts at each row."""

    accept: jax.Array  # [..., P] float32, min(1, q_s(x_s) / p_s(x_s))
    overlap: jax.Array  # [..., P] float32, sum_v min(p_s, q_s), which is 1 - total variation
    log_q: jax.Array  # [..., P] float32, the head's own log-probability of x_s, unfiltered


@dataclasses.dataclass(frozen=True)
class Walk:
    """A decode of given texts in expectation, with P - 1 drafted tokens a cycle."""

    tokens: np.ndarray  # [B] float64, expected number of tokens that cycles emit
    calls: np.ndarray  # [B] float64, expected number of cycles, each one trunk call
    reached: np.ndarray  # [P-1] float64, expected number of drafted tokens that are tested
    accepted: np.ndarray  # [P-1] float64, and that are kept

    @property
    def tokens_per_call(self) -> float:
        """Over all texts together."""
        return float(self.tokens.sum() / max(self.calls.sum(), 1e-30))

    def stderr(self) -> float:
        """Standard error of `tokens_per_call` over texts, as of a ratio of means."""
        if len(self.calls) < 2:
            return float("nan")
        residual = self.tokens - self.tokens_per_call * self.calls
        return float(np.sqrt(residual.var(ddof=1) / len(residual)) / max(self.calls.mean(), 1e-30))


def follow(
    factors: draft.Factors,
    laws: jax.Array,  # [B, P, V] float32, log p of the target for each step, filtered
    tokens: jax.Array,  # [B, P] int32
    sampling: SamplingConfig,
) -> Steps:
    """The steps of one cycle per row of B, conditioned on `tokens`.

    Step 0 is the token that a cycle already knows: it is measured, but nothing drafts it. After a
    token that the head cannot predict, nothing is accepted and log q is -inf.
    """
    belief = factors.log_w[:, None]
    found = []
    for step, log_p in enumerate(factors.log_p):
        log_q = draft.conditional(belief, log_p)[:, 0]  # [B, V']
        token = tokens[:, step]
        index, known = _place(factors, token)
        own = jnp.where(known, _at(log_q, index), -jnp.inf)
        filtered = _all_tokens(factors, draws.log_probs(log_q, sampling))
        law = laws[:, step]
        gap = _at(filtered, token) - _at(law, token)
        # a token that the target never draws (given text, not drawn) is not accepted either
        accept = jnp.where(_at(law, token) > -jnp.inf, jnp.exp(jnp.minimum(gap, 0.0)), 0.0)
        overlap = jnp.sum(jnp.exp(jnp.minimum(filtered, law)), axis=-1)
        found.append((accept, jnp.minimum(overlap, 1.0), own))
        seen = jnp.take_along_axis(log_p, index[:, None, None], axis=2)[:, None, :, 0]
        seen = jnp.where(known[:, None, None], seen, -jnp.inf)
        belief = draft.observe(belief, seen, factors.log_a[step])
    accept, overlap, log_q = (jnp.stack(part, axis=-1) for part in zip(*found, strict=True))
    # log q is of a chain: one impossible token makes all that follow it impossible too
    return Steps(
        accept, overlap, jnp.where(jnp.cumsum(log_q == -jnp.inf, axis=-1), -jnp.inf, log_q)
    )


def measure(
    head_params: HeadParams,
    head_config: HeadConfig,
    model: ModelConfig,
    params: transformer.Params,  # in the compute dtype
    tokens: jax.Array,  # [B, T] int32, padded on the right
    lengths: jax.Array,  # [B] int32
    sampling: SamplingConfig,
    *,
    valid_vocab: int | None = None,
    implementation: str | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
) -> tuple[Steps, jax.Array]:
    """Teacher-forces texts through model and head, `chunk_bytes` of logits at a time.

    Returns:
      Steps of [B, T, P], and which of them exist, [B, T, P] bool: step s of row t is about token
      t + 1 + s, which must lie in the text. What does not exist is finite and means nothing.
    """
    states = _states(model, implementation, params, tokens, lengths)
    program = _Program(head_config, model, sampling, valid_vocab, chunk_bytes)
    steps = _steps(program, head_params, params, states, tokens)
    return steps, exists(lengths, tokens.shape[1], head_config.predicted)


def exists(lengths: jax.Array, size: int, predicted: int) -> jax.Array:
    """[B, T, P] bool: whether token t + 1 + s lies in a text of `lengths` [B]."""
    target = 1 + jnp.arange(size)[:, None] + jnp.arange(predicted)[None]
    return target[None] < lengths[:, None, None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _states(model, implementation, params, tokens, lengths):
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    until = jnp.where(positions < lengths[:, None], lengths[:, None], 0).astype(jnp.int32)
    context = contexts.Training(Visibility(until=until), None, implementation)
    return transformer.hidden(model, params, tokens, positions, context)[0]


@dataclasses.dataclass(frozen=True)
class _Program:
    """All that is static in `_steps`."""

    head: HeadConfig
    model: ModelConfig
    sampling: SamplingConfig
    valid_vocab: int | None
    chunk_bytes: int


@functools.partial(jax.jit, static_argnums=0)
def _steps(program, head_params, params, states, tokens):
    """Chunk by chunk of positions, so that no [B, T, V] array is kept."""
    model, valid_vocab, sampling = program.model, program.valid_vocab, program.sampling
    B, T, D = states.shape
    P, V = program.head.predicted, model.vocab_size
    per_position = 4 * B * V * (2 * P + 3 * program.head.rank)
    size = max(1, min(T, program.chunk_bytes // per_position))
    pieces = -(-T // size)
    table = transformer.unembedding(model, params)
    padding = pieces * size + P - T
    states = jnp.pad(states, ((0, 0), (0, padding), (0, 0)))
    tokens = jnp.pad(tokens, ((0, 0), (0, padding + 1)))

    def chunk(start):
        rows = jax.lax.dynamic_slice_in_dim(states, start, size + P - 1, 1)
        laws = transformer.logits(model, params, rows)
        laws = draws.log_probs(laws, sampling, valid_vocab)  # [B, size + P - 1, V]
        following = jax.lax.dynamic_slice_in_dim(tokens, start + 1, size + P - 1, 1)
        roots = rows[:, :size].reshape(B * size, D)
        factors = draft.factors(head_params, program.head, model, roots, table, valid_vocab)
        out = follow(factors, _windows(laws, size, P), _windows(following, size, P), sampling)
        return jax.tree.map(lambda x: x.reshape(B, size, P), out)

    out = jax.lax.map(chunk, size * jnp.arange(pieces))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, pieces * size, P)[:, :T], out)


def _windows(x: jax.Array, size: int, width: int) -> jax.Array:
    """[B, size + width - 1, ...] -> [B size, width, ...]: what follows each of `size` places."""
    out = jnp.stack([x[:, step : step + size] for step in range(width)], axis=2)
    return out.reshape(-1, *out.shape[2:])


def walk(
    accept: np.ndarray,  # [B, T, P]
    lengths: np.ndarray,  # [B]
    starts: np.ndarray,  # [B], the first token that was drawn: a cycle starts at the row before it
    predicted: int | None = None,
) -> Walk:
    """Follows the cycles of a decoder that drafts `predicted` - 1 tokens, by default P - 1.

    The first drawn token comes from the prompt's own call and is nobody's. A cycle is counted where
    its text holds all that it could emit, so the result does not depend on how texts end.
    """
    P = predicted or accept.shape[-1]
    if not 1 <= P <= accept.shape[-1]:
        raise ValueError(f"{P} factors of a head that has {accept.shape[-1]}")
    B, T = accept.shape[:2]
    lengths, starts = np.asarray(lengths), np.asarray(starts)
    # start[b, t]: probability that a cycle starts at row t, whose next token is known
    start = np.zeros((B, T + P))
    start[np.arange(B), np.maximum(starts - 1, 0)] = 1.0
    calls, tokens = np.zeros(B), np.zeros(B)
    reached, accepted = np.zeros(P - 1), np.zeros(P - 1)
    for t in range(T):
        going, whole = start[:, t], t + P < lengths
        calls += going * whole
        tokens += going * whole
        for step in range(1, P):
            going = going * (t + 1 + step < lengths)
            kept = going * accept[:, t, step]
            tokens += kept * whole
            reached[step - 1] += (going * whole).sum()
            accepted[step - 1] += (kept * whole).sum()
            start[:, t + step] += going - kept
            going = kept
        start[:, t + P] += going
    return Walk(tokens, calls, reached, accepted)


def expected_accepted(
    accept: np.ndarray,  # [B, T, P]
    overlap: np.ndarray,  # [B, T, P]
    roots: np.ndarray,  # [B, T] bool, the positions to average over
    predicted: int | None = None,
) -> float:
    """E[accepted] at a position chosen evenly among `roots`: the formula at the top of this file.

    Only texts that go on for all of the steps count, so `roots` must leave out the last ones.
    """
    P = predicted or accept.shape[-1]
    before = np.cumprod(accept[..., 1 : P - 1], axis=-1, dtype=np.float64)
    before = np.concatenate([np.ones((*accept.shape[:2], min(P - 1, 1))), before], axis=-1)
    total = (before * overlap[..., 1:P]).sum(-1)
    return float((total * roots).sum() / max(roots.sum(), 1))


def _place(factors: draft.Factors, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Places of tokens [B] in the draft vocabulary, and whether they have one."""
    if factors.ids is None:
        return tokens, jnp.ones(tokens.shape, bool)
    index = jnp.minimum(jnp.searchsorted(factors.ids, tokens), factors.ids.shape[0] - 1)
    return index, factors.ids[index] == tokens


def _all_tokens(factors: draft.Factors, law: jax.Array) -> jax.Array:
    """A law [B, V'] over the draft vocabulary as [B, V]."""
    if factors.ids is None:
        return law
    nothing = jnp.full((law.shape[0], factors.vocab), -jnp.inf, law.dtype)
    return nothing.at[:, factors.ids].set(law)


def _at(laws: jax.Array, tokens: jax.Array) -> jax.Array:
    """laws [B, V] at tokens [B]."""
    return jnp.take_along_axis(laws, tokens[:, None], axis=1)[:, 0]
