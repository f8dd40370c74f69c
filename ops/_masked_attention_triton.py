# SPDX-License-Identifier: Apache-2.0
"""masked_attention on CUDA GPUs from Ampere on, in Triton: what is served, block lists, and the
gradient."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ops import _block_lists, _saved, dispatch
from ops._varying import common_varying, varying_like
from ops.visibility import Visibility
from pallas_kernels import masked_attention_triton_config as configs
from pallas_kernels import triton_call

_DTYPES = ("bfloat16", "float16", "float32")
_LN_2 = 0.6931471805599453


class _Plan(NamedTuple):
    capability: int
    forward: configs.Config
    dq: configs.Config
    dkdv: configs.Config


def masked_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    visibility: Visibility,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, H], [B, T, N]
    plan = _plan(q, k, v)
    if scale < 0:  # the kernels take the largest score before they scale it
        q, scale = -q, -scale
    q, k, v, visibility = common_varying((q, k, v, visibility))
    return _attend(q, k, v, visibility, scale, plan)


def _plan(q: jax.Array, k: jax.Array, v: jax.Array) -> _Plan:
    """Raises Unsupported unless the kernels serve these arrays here."""
    platform, head_dim = dispatch.current_platform(), q.shape[3]
    if platform != "gpu":
        raise dispatch.Unsupported(f"triton: runs on CUDA GPUs (here: {platform})")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in _DTYPES:
        raise dispatch.Unsupported(
            f"triton: q, k and v of types {q.dtype}, {k.dtype} and {v.dtype}; one of "
            f"{', '.join(_DTYPES)} for all three is served"
        )
    if head_dim not in configs.HEAD_DIMS:
        raise dispatch.Unsupported(f"triton: head dim {head_dim}; 64, 128 and 256 are served")
    try:
        capability = triton_call.capability()
        triton_call.require()
    except triton_call.Missing as missing:
        raise dispatch.Unsupported(f"triton: {missing}") from None
    if capability < 80:
        raise dispatch.Unsupported(
            f"triton: compute capability {capability}; 80 and later is served"
        )
    return _Plan(
        capability,
        *(configs.config(name, capability, head_dim, q.dtype) for name in configs.PASSES),
    )


def _kernels():
    # imports triton, which machines without a GPU need not have
    from pallas_kernels import masked_attention_triton

    return masked_attention_triton


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, visibility, scale, plan):
    return _attend_fwd(q, k, v, visibility, scale, plan)[0]


def _attend_fwd(q, k, v, visibility, scale, plan):
    lists = _lists(_table(visibility, q, plan.forward))
    out, lse = _kernels().forward(
        q, k, v, _vectors(visibility), lists, scale, plan.forward, plan.capability
    )
    out, lse = _saved.attention(*varying_like((out, lse), q))
    return (out, _LN_2 * lse.transpose(0, 2, 1)), (q, k, v, visibility, out, lse)


def _attend_bwd(scale, plan, saved, cotangents):
    q, k, v, visibility, out, lse = saved
    d_out, d_lse = cotangents
    # d score = weight * (d weight - sum over keys of weight * d weight + d lse)
    shift = d_lse - jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    shift = jnp.where(lse == -jnp.inf, 0.0, shift.transpose(0, 2, 1))
    row_lists = _lists(_table(visibility, q, plan.dq))
    key_lists = _lists(jnp.swapaxes(_table(visibility, q, plan.dkdv), 1, 2))
    gradients = _kernels().backward(
        q,
        k,
        v,
        d_out,
        lse,
        shift,
        _vectors(visibility),
        row_lists,
        key_lists,
        scale,
        plan.dq,
        plan.dkdv,
        plan.capability,
    )
    return (*varying_like(gradients, q), None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _vectors(visibility: Visibility) -> tuple[jax.Array | None, ...]:
    return (
        visibility.until,
        visibility.hidden_from,
        visibility.hidden_until,
        visibility.row_offset,
    )


def _table(visibility: Visibility, q: jax.Array, config: configs.Config) -> jax.Array:
    return visibility.block_table(q.shape[1], config.block_q, config.block_k)


_lists = _block_lists.full_first
