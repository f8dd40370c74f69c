# SPDX-License-Identifier: Apache-2.0
"""linear_log_prob on TPU through Pallas: what the kernels serve, the blocks of rows that they
visit, and the derivative."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from ops import _tpu, dispatch
from ops._linear_log_prob_reference import combine, first_column, weighted_total
from ops._linear_log_prob_xla import instantiated
from ops._varying import common_varying, varying_like
from pallas_kernels import linear_log_prob_tpu as kernels
from pallas_kernels import masked_attention_tpu, tpu_interpret

_DTYPES = ("bfloat16", "float32")
_LANES = masked_attention_tpu.LANES


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
    call = _Call(softcap, valid_vocab, *_fitting(x, w), tpu_interpret.current())
    first = first_column(w, vocab_axis)
    lse, target_logit = _terms(*common_varying((x, w, targets, first)), call)
    log_prob = combine(lse, target_logit, targets, vocab_axis)
    return log_prob if weights is None else (weighted_total(weights, log_prob), log_prob)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What does not depend on arrays."""

    softcap: float | None
    valid_vocab: int | None
    blocks: kernels.BlockSizes
    vmem_bytes: int
    interpret: object

    @property
    def options(self) -> dict[str, object]:
        names = ("softcap", "blocks", "vmem_bytes", "interpret")
        return {name: getattr(self, name) for name in names}


def _fitting(x: jax.Array, w: jax.Array) -> tuple[kernels.BlockSizes, int]:
    """Blocks, and what of VMEM they may take. Raises Unsupported unless the kernels serve these
    arrays here."""
    _tpu.require()
    if x.dtype != w.dtype or x.dtype.name not in _DTYPES:
        raise dispatch.Unsupported(
            f"pallas_tpu: x and w of types {x.dtype} and {w.dtype}; one of "
            f"{' and '.join(_DTYPES)} for both is served"
        )
    if x.shape[1] % _LANES:
        raise dispatch.Unsupported(
            f"pallas_tpu: {x.shape[1]} columns of x; multiples of {_LANES} are served"
        )
    vmem_bytes = masked_attention_tpu.vmem_bytes(_tpu.chip())
    try:
        return block_sizes(x, w, vmem_bytes), vmem_bytes
    except ValueError as error:
        raise dispatch.Unsupported(f"pallas_tpu: {error}") from None


def block_sizes(x: jax.Array, w: jax.Array, vmem_bytes: int) -> kernels.BlockSizes:
    return kernels.block_sizes(*x.shape, w.shape[0], x.dtype.itemsize, vmem_bytes)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _terms(x, w, targets, first, call):
    return _forward(x, w, targets, first, call, with_mean=False)[:2]


def _terms_fwd(x, w, targets, first, call):
    with_mean, with_dw = x.perturbed, w.perturbed
    x, w, targets, first = (array.value for array in (x, w, targets, first))
    lse, target_logit, *mean = _forward(x, w, targets, first, call, with_mean=with_mean)
    # The empty array says that somebody asks for dw: a frozen one is not computed.
    asked = w[:0] if with_dw else None
    return (lse, target_logit), (x, w, targets, first, lse, target_logit, mean, asked)


def _terms_bwd(call, saved, cotangents):
    x, w, targets, first, lse, target_logit, mean, asked = saved
    d_lse, d_target = (
        jnp.where(targets < 0, 0.0, instantiated(cotangent, lse)) for cotangent in cotangents
    )
    d_lse = jnp.where(lse == -jnp.inf, 0.0, d_lse)
    here = (targets >= 0) & (target_logit > -jnp.inf)
    dx = dw = None
    if mean:
        chosen = w[jnp.where(here, targets - first, 0)].astype(jnp.float32)
        scale = d_lse * jnp.exp(target_logit - jnp.where(here, lse, 0.0)) + d_target
        if call.softcap is not None:
            scale *= 1.0 - jnp.square(target_logit / call.softcap)
        dx = jnp.where(here, scale, 0.0)[:, None] * chosen
        dx += d_lse[:, None] * mean[0].astype(jnp.float32)
        dx = dx.astype(x.dtype)
    if asked is not None:
        x, local, lists = _arguments(x, w, targets, first, call)
        lse = jnp.where((targets < 0) | (lse == -jnp.inf), jnp.inf, lse)
        d_target = jnp.where(here, d_target, 0.0)
        statistics = (
            _padded(value, call, fill)
            for value, fill in ((lse, jnp.inf), (d_lse, 0.0), (d_target, 0.0))
        )
        dw = kernels.gradient(x, w, local, *statistics, *lists, **call.options)
        dw = varying_like(dw, x)
    return dx, dw, None, None


_terms.defvjp(_terms_fwd, _terms_bwd, symbolic_zeros=True)


def _forward(x, w, targets, first, call, *, with_mean):
    R = len(targets)
    padded, local, lists = _arguments(x, w, targets, first, call)
    lse, target_logit, *mean = varying_like(
        kernels.forward(padded, w, local, *lists, with_mean=with_mean, **call.options), x
    )
    lse, target_logit = (
        jnp.where(targets < 0, 0.0, values[0, :R]) for values in (lse, target_logit)
    )
    return lse, target_logit, *(values[:R] for values in mean)


def _arguments(x, w, targets, first, call):
    """x and local targets in whole blocks of rows; the order of these blocks, those with a target
    first, how many those are (at least one, so that every block of dw is written), and the number
    of columns that count."""
    limit = jnp.int32(w.shape[0])
    if call.valid_vocab is not None:
        limit = jnp.clip(call.valid_vocab - first, 0, w.shape[0])
    local = targets - first
    local = jnp.where((targets >= 0) & (local >= 0) & (local < limit), local, kernels.ABSENT)
    tail = -len(targets) % call.blocks.rows
    needed = jnp.pad(targets >= 0, (0, tail)).reshape(-1, call.blocks.rows).any(axis=1)
    order = jnp.argsort(~needed, stable=True).astype(jnp.int32)
    count = jnp.maximum(jnp.sum(needed, dtype=jnp.int32), 1)
    x = jnp.pad(x, ((0, tail), (0, 0))) if tail else x
    return x, _padded(local, call, kernels.ABSENT), (order, jnp.stack([count, limit]))


def _padded(values: jax.Array, call: _Call, fill: float) -> jax.Array:
    """[1, whole blocks of rows]"""
    tail = -len(values) % call.blocks.rows
    return jnp.pad(values, (0, tail), constant_values=fill)[None]
