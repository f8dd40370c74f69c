# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities by chunks of rows, each with the whole vocabulary, in plain XLA.

A loop with a run-time trip count walks the chunks that have a target, so chunks of padding cost
nothing. The general form keeps the log-sum-exp of every row and recomputes the logits in the
backward pass: four products of R * D * V. The weighted form knows the cotangents of its rows
beforehand up to one scalar, so the forward pass makes the gradients as well: three products, and
nothing of size R * V or chunk * V outlives the loop.

What happens to a chunk between its products is a `Passes`: XLA's own here, Triton's kernels in
`_linear_log_prob_triton`.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ops import dispatch
from ops._linear_log_prob_reference import (
    combine,
    countable,
    first_column,
    weighted_total,
)
from ops._varying import common_varying, varying_like

# Float32 logits of a chunk. Every chunk reads and writes the gradient of w once, so small ones cost
# time. One H100, 32768 rows, D 2048, V 128256, bfloat16, weighted form with both gradients: 134 ms
# at 256 MiB, 101 at 512, 94 at 1024 (temporaries 2.0 GiB), 90 at 2048 (3.9 GiB). A CPU prefers its
# cache.
_LOGIT_BYTES = {"cpu": 16 << 20, "gpu": 1024 << 20, "tpu": 256 << 20}
_FEWEST_ROWS = 128

# Part of jit's cache key, so that another budget is another program.
_override = jax.make_user_context(None)


def override(num_bytes: int) -> Any:
    """Context manager: `logit_bytes()` is this, for tuning."""
    return _override(num_bytes)


class Chunk(NamedTuple):
    x: jax.Array  # [chunk, D]
    w: jax.Array  # [V, D]
    targets: jax.Array  # [chunk] int32, negative for padding
    first: jax.Array  # int32, the global index of w's first row


class Passes(Protocol):
    """The products that make logits, and what is done with them; hashable.

    Statistics and cotangents are [chunk] float32. lse is -inf where every column is excluded, the
    target's logit where the target is no valid column here.
    """

    def statistics(self, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
        """Log-sum-exp and the target's logit."""

    def gradients(
        self, chunk: Chunk, lse: jax.Array, d_lse: jax.Array, d_target: jax.Array
    ) -> jax.Array:
        """[chunk, V], of the uncapped logits, from cotangents of both statistics."""

    def weighted(
        self, chunk: Chunk, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Statistics, gradients of weights * (target's logit - lse) by the logits, and, if these
        still lack it, a factor of each row."""


@dataclasses.dataclass(frozen=True)
class Settings:
    chunk: int  # rows
    passes: Passes


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
    settings = Settings(chunk_rows(x.shape[0], w.shape[0]), _XlaPasses(softcap, valid_vocab))
    return by_chunks(x, w, targets, weights, vocab_axis, settings)


def by_chunks(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None,
    vocab_axis: str | None,
    settings: Settings,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    if weights is not None and vocab_axis is None:
        x, w, targets, weights = common_varying((x, w, targets, weights))
        return _weighted(x, w, targets, weights, settings)
    first = first_column(w, vocab_axis)
    local = common_varying((x, w, targets, first))
    lse, target_logit = _terms(*local, settings)
    log_prob = combine(lse, target_logit, targets, vocab_axis)
    return log_prob if weights is None else (weighted_total(weights, log_prob), log_prob)


def logit_bytes() -> int:
    """How much the float32 logits of a chunk may take."""
    return _override.value or _LOGIT_BYTES.get(dispatch.current_platform(), _LOGIT_BYTES["cpu"])


def chunk_rows(num_rows: int, vocab: int) -> int:
    """Rows whose logits take `logit_bytes()` at most, but at least 128, cut so that chunks are
    nearly equal."""
    most = max(_FEWEST_ROWS, logit_bytes() // (4 * vocab))
    number = -(-num_rows // most)
    even = -(-num_rows // number)
    return even if number == 1 else -(-even // 8) * 8


# --- the general form: (lse, target logit) of every row


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _terms(x, w, targets, first, settings):
    rows, todo = _chunks(x, targets, settings)

    def chunk(step, state):
        index = todo.indices[step]
        part = settings.passes.statistics(Chunk(rows.x[index], w, rows.targets[index], first))
        return tuple(old.at[index].set(new) for old, new in zip(state, part, strict=True))

    nothing = varying_like((jnp.zeros(rows.targets.shape, jnp.float32),) * 2, x)
    lse, target_logit = jax.lax.fori_loop(0, todo.count, chunk, nothing)
    return lse.reshape(-1)[: len(x)], target_logit.reshape(-1)[: len(x)]


def _terms_fwd(x, w, targets, first, settings):
    # The empty arrays say which gradients somebody asks for: a frozen one is not computed.
    asked = tuple(array.value[:0] if array.perturbed else None for array in (x, w))
    x, w, targets, first = (array.value for array in (x, w, targets, first))
    lse, target_logit = _terms(x, w, targets, first, settings)
    return (lse, target_logit), (x, w, targets, first, lse, asked)


def _terms_bwd(settings, saved, cotangents):
    x, w, targets, first, lse, (asked_x, asked_w) = saved
    cotangents = (instantiated(cotangent, lse) for cotangent in cotangents)
    rows, todo = _chunks(x, targets, settings)
    lse, d_lse, d_target = (_split(values, settings.chunk) for values in (lse, *cotangents))

    def chunk(step, state):
        dx, dw = state
        index = todo.indices[step]
        part = Chunk(rows.x[index], w, rows.targets[index], first)
        d_logits = settings.passes.gradients(part, lse[index], d_lse[index], d_target[index])
        if dx is not None:
            dx = dx.at[index].set(_product("RV,VD->RD", d_logits, w, x.dtype).astype(x.dtype))
        if dw is not None:
            dw += _product("RV,RD->VD", d_logits, rows.x[index], x.dtype)
        return dx, dw

    dx = None if asked_x is None else jnp.zeros(rows.x.shape, x.dtype)
    dw = None if asked_w is None else jnp.zeros(w.shape, jnp.float32)
    dx, dw = jax.lax.fori_loop(0, todo.count, chunk, varying_like((dx, dw), x))
    dx = None if dx is None else dx.reshape(-1, x.shape[1])[: len(x)]
    return dx, None if dw is None else dw.astype(w.dtype), None, None


def instantiated(cotangent: Any, like: jax.Array) -> jax.Array:
    symbolic = isinstance(cotangent, jax.custom_derivatives.SymbolicZero)
    return jnp.zeros_like(like) if symbolic else cotangent


_terms.defvjp(_terms_fwd, _terms_bwd, symbolic_zeros=True)


# --- the weighted form: sum of weights * log-probabilities, gradients made on the way


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted(x, w, targets, weights, settings):
    first = jnp.zeros_like(targets[0])
    log_prob = combine(*_terms(x, w, targets, first, settings), targets, None)
    return weighted_total(weights, log_prob), log_prob


def _weighted_fwd(x, w, targets, weights, settings):
    need_x, need_w = x.perturbed, w.perturbed
    x, w, targets, weights = x.value, w.value, targets.value, weights.value
    rows, todo = _chunks(x, targets, settings)
    scales = jnp.where(rows.targets < 0, 0.0, _split(weights, settings.chunk))
    first = jnp.zeros_like(targets[0])

    def chunk(step, state):
        log_prob, dx, dw = state
        index = todo.indices[step]
        part = Chunk(rows.x[index], w, rows.targets[index], first)
        lse, target_logit, d_logits, factors = settings.passes.weighted(part, scales[index])
        log_prob = log_prob.at[index].set(target_logit - lse)
        if need_x:
            new = _product("RV,VD->RD", d_logits, w, x.dtype)
            new = new if factors is None else factors[:, None] * new
            dx = dx.at[index].set(new.astype(dx.dtype))
        if need_w:
            dw += _product("RV,RD->VD", d_logits, _scaled(part.x, factors), x.dtype)
        return log_prob, dx, dw

    # A gradient that nobody asked for (frozen w) is not computed.
    dx = jnp.zeros(rows.x.shape, product_dtype(x.dtype)) if need_x else None
    dw = jnp.zeros(w.shape, jnp.float32) if need_w else None
    state = varying_like((jnp.zeros(rows.targets.shape, jnp.float32), dx, dw), x)
    log_prob, dx, dw = jax.lax.fori_loop(0, todo.count, chunk, state)
    log_prob = jnp.where(targets < 0, 0.0, log_prob.reshape(-1)[: len(x)])
    dx = dx.reshape(-1, x.shape[1])[: len(x)] if need_x else None
    dw = dw.astype(product_dtype(w.dtype)) if need_w else None
    # The empty arrays carry the types of the gradients.
    saved = (dx, dw, weights, countable(weights, log_prob), x[:0], w[:0])
    return (weighted_total(weights, log_prob), log_prob), saved


def _weighted_bwd(settings, saved, cotangents):
    del settings
    dx, dw, weights, log_prob, like_x, like_w = saved
    d_total = cotangents[0]  # the public function stops the gradient of log_prob
    if isinstance(d_total, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None

    def scaled(gradient, dtype):
        return None if gradient is None else (d_total * gradient).astype(dtype)

    return (
        scaled(dx, like_x.dtype),
        scaled(dw, like_w.dtype),
        None,
        scaled(log_prob, weights.dtype),
    )


_weighted.defvjp(_weighted_fwd, _weighted_bwd, symbolic_zeros=True)


# --- one chunk


class _Rows(NamedTuple):
    x: jax.Array  # [chunks, chunk, D]
    targets: jax.Array  # [chunks, chunk], -1 beyond R


class _Todo(NamedTuple):
    count: jax.Array  # scalar: chunks with at least one target
    indices: jax.Array  # [chunks], those chunks first


def _chunks(x: jax.Array, targets: jax.Array, settings: Settings) -> tuple[_Rows, _Todo]:
    rows = _Rows(_split(x, settings.chunk), _split(targets, settings.chunk, -1))
    needed = jnp.any(rows.targets >= 0, axis=1)
    return rows, _Todo(jnp.sum(needed, dtype=jnp.int32), jnp.argsort(~needed, stable=True))


def _split(values: jax.Array, chunk: int, fill: int = 0) -> jax.Array:
    tail = -len(values) % chunk
    padding = ((0, tail),) + ((0, 0),) * (values.ndim - 1)
    padded = jnp.pad(values, padding, constant_values=fill) if tail else values
    return padded.reshape(-1, chunk, *values.shape[1:])


def _scaled(x: jax.Array, factors: jax.Array | None) -> jax.Array:
    """x with its rows multiplied; rows of factor 0 count for nothing, whatever they hold."""
    if factors is None:
        return x
    factors = factors[:, None]
    scaled = (factors * x.astype(jnp.float32)).astype(product_dtype(x.dtype))
    return jnp.where(factors == 0, jnp.zeros_like(scaled), scaled)


def logits_of(x: jax.Array, w: jax.Array) -> jax.Array:
    """[rows, V] float32, before the cap."""
    return jnp.einsum("RD,VD->RV", x, w, preferred_element_type=jnp.float32)


def product_dtype(dtype) -> jnp.dtype:
    """float16 cannot hold the range of gradients before they are scaled; bfloat16 can."""
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else jnp.dtype(dtype)


def _product(subscripts: str, d_logits: jax.Array, other: jax.Array, dtype) -> jax.Array:
    dtype = product_dtype(dtype)
    return jnp.einsum(
        subscripts, d_logits.astype(dtype), other.astype(dtype), preferred_element_type=jnp.float32
    )


# --- XLA's passes


class _Terms(NamedTuple):
    """One chunk; `logits` are capped, and -inf in excluded columns."""

    logits: jax.Array  # [chunk, V]
    lse: jax.Array  # [chunk]
    target_logit: jax.Array  # [chunk], -inf where the target is no valid column
    is_target: jax.Array  # [chunk, V]


@dataclasses.dataclass(frozen=True)
class _XlaPasses:
    softcap: float | None
    valid_vocab: int | None

    def statistics(self, chunk):
        part = self._terms(chunk)
        return part.lse, part.target_logit

    def gradients(self, chunk, lse, d_lse, d_target):
        part = self._terms(chunk)
        d_logits = d_lse[:, None] * _probabilities(part.logits, lse)
        d_logits += jnp.where(part.is_target, d_target[:, None], 0.0)
        return self._through_cap(d_logits, part.logits)

    def weighted(self, chunk, weights):
        part = self._terms(chunk)
        d_logits = jnp.where(part.is_target, 1.0, 0.0) - _probabilities(part.logits, part.lse)
        d_logits = self._through_cap(weights[:, None] * d_logits, part.logits)
        return part.lse, part.target_logit, d_logits, None

    def _terms(self, chunk: Chunk) -> _Terms:
        logits = logits_of(chunk.x, chunk.w)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        columns = jnp.arange(logits.shape[1], dtype=jnp.int32)
        is_valid = jnp.ones(columns.shape, bool)
        if self.valid_vocab is not None:
            is_valid = chunk.first + columns < self.valid_vocab
            logits = jnp.where(is_valid[None, :], logits, -jnp.inf)
        largest = jnp.max(logits, axis=1)
        base = jnp.where(largest == -jnp.inf, 0.0, largest)
        total = jnp.sum(jnp.exp(logits - base[:, None]), axis=1)

        local = chunk.targets - chunk.first
        is_target = (columns[None, :] == local[:, None]) & is_valid[None, :]
        safe = jnp.clip(local, 0, logits.shape[1] - 1)
        chosen = jnp.take_along_axis(logits, safe[:, None], axis=1)[:, 0]
        target_logit = jnp.where(local == safe, chosen, -jnp.inf)
        return _Terms(logits, base + jnp.log(total), target_logit, is_target)

    def _through_cap(self, d_logits: jax.Array, capped: jax.Array) -> jax.Array:
        if self.softcap is None:
            return d_logits
        slope = 1.0 - jnp.square(capped / self.softcap)
        return jnp.where(capped == -jnp.inf, 0.0, d_logits * slope)


def _probabilities(logits: jax.Array, lse: jax.Array) -> jax.Array:
    return jnp.exp(logits - jnp.where(lse == -jnp.inf, 0.0, lse)[:, None])
