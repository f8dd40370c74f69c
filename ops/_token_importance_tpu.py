# SPDX-License-Identifier: Apache-2.0
"""Importance of cached tokens on TPU through Pallas: what the kernels serve, and their layouts."""

from functools import partial

import jax
import jax.numpy as jnp

from ops import _stacked, _tpu, dispatch
from ops._token_importance_xla import Combination, combined
from ops._varying import common_varying
from pallas_kernels import masked_attention_tpu as attention_kernels
from pallas_kernels import token_importance_tpu as kernels
from pallas_kernels import tpu_interpret

_Q_DTYPES = ("bfloat16", "float32")
_K_DTYPES = (*_Q_DTYPES, "int8", "float8_e4m3fn")
_KV_HEADS = (2, 4, 8, 16, 32)
_MOST_ROWS = 1024  # of all heads, padding included: the kernels hold them in registers and VMEM
_SUBLANES = 8


def token_importance(
    q: jax.Array,  # [B, W, N, H]
    k: jax.Array,  # [L, B, S, K, H]
    begin: jax.Array,  # [B] int32 in 0 .. S
    end: jax.Array,  # [B, W] int32 in 0 .. S
    layer: jax.Array,  # [] int32
    k_scale: jax.Array | None,  # [L, B, S, K]
    row_weights: jax.Array | None,  # [B, W] float32
    head_weights: jax.Array | None,  # [N] float32
    *,
    scale: float,
    normalize: bool,
    reduce: str,
    heads: str,
    gqa: str,
    return_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
    B, W, N, H = q.shape
    S, K = k.shape[2:4]
    G = N // K
    rows, window = _rows(W, G)
    _check(q, k, rows)
    q, k, begin, end, layer, k_scale, row_weights, head_weights = common_varying(
        (q, k, begin, end, layer, k_scale, row_weights, head_weights)
    )
    combination = Combination(reduce, heads, gqa)
    settings = kernels.Settings(
        scale=scale,
        block=kernels.block_size(S, K * H * k.dtype.itemsize),
        normalize=normalize,
        heads=heads,
        maximum=reduce == "max",
        window=window,
        vmem_bytes=attention_kernels.vmem_bytes(_tpu.chip()),
        interpret=tpu_interpret.current(),
    )

    by_rows = partial(_by_rows, combination=combination, K=K, rows=rows, window=window)
    ends = in_lanes(by_rows(jnp.broadcast_to(end[:, :, None], (B, W, N)))[:, 0])
    arrays = by_rows(q.astype(_stacked.compute_dtype(q, k))), ends, k
    factors = None
    if k_scale is not None:
        of_layer = jax.lax.dynamic_index_in_dim(k_scale, layer, keepdims=False)
        factors = jnp.swapaxes(of_layer, 1, 2)
    scalars, steps = _ranges(begin, end, layer, settings.block)

    lse = None
    if W == 1 or normalize or return_lse:
        keep = G if W == 1 else 0
        lse, *kept = kernels.statistics(
            *arrays, factors, scalars, steps, keep=keep, settings=settings
        )
    if W == 1:
        subtracted = lse[:, :, :G, :1] if normalize else None
        rules = begin, end, row_weights, head_weights
        scores = combined(kept[0].reshape(B, K, G, 1, S), rules, subtracted, combination)
    else:
        weights = in_lanes(by_rows(_weights(row_weights, head_weights, (B, W, N))))
        scores = kernels.scores(*arrays, weights, factors, lse, scalars, steps, settings=settings)
        scores = scores.reshape(B, -1, G if heads == "query" else 1, S)
    scores = combination.finish(scores, begin, end, N, 0.0 if normalize else -jnp.inf)
    if not return_lse:
        return scores, None
    lse = lse[:, :, : G * window, 0].reshape(B, K, G, window)[..., :W]
    return scores, combination.join_heads(lse.transpose(0, 3, 1, 2))


def _by_rows(x: jax.Array, combination: Combination, K: int, rows: int, window: int) -> jax.Array:
    """[B, W, N, ...] -> [B, K, rows, ...]: the heads of a KV head, the window of each; zeros for
    the rows that fill up."""
    x = combination.split_heads(jnp.moveaxis(x, 2, -1), K)  # [B, W, ..., K, G]
    x = jnp.moveaxis(x, (-2, -1, 1), (1, 2, 3))  # [B, K, G, W, ...]
    B, _, G, W, *rest = x.shape
    tail = ((0, 0),) * len(rest)
    x = jnp.pad(x, (*((0, 0),) * 3, (0, window - W), *tail)).reshape(B, K, G * window, *rest)
    return jnp.pad(x, (*((0, 0),) * 2, (0, rows - G * window), *tail))


def _weights(
    row_weights: jax.Array | None, head_weights: jax.Array | None, shape: tuple[int, ...]
) -> jax.Array:  # [B, W, N]
    weights = jnp.ones(shape, jnp.float32)
    weights = weights if row_weights is None else weights * row_weights[:, :, None]
    return weights if head_weights is None else weights * head_weights[None, None]


def in_lanes(x: jax.Array) -> jax.Array:
    """[..., rows] -> [..., rows, LANES]: a column that every lane can be compared with."""
    return jnp.broadcast_to(x[..., None], (*x.shape, kernels.LANES))


def _rows(W: int, G: int) -> tuple[int, int]:
    """Rows of a KV head, and rows of each of its query heads, as the kernels have them."""
    window = 1 if W == 1 else -(-W // _SUBLANES) * _SUBLANES
    return -(-G * window // _SUBLANES) * _SUBLANES, window


def _check(q: jax.Array, k: jax.Array, rows: int) -> None:
    _tpu.require()
    if q.dtype.name not in _Q_DTYPES or k.dtype.name not in _K_DTYPES:
        raise dispatch.Unsupported(
            f"pallas_tpu: q of type {q.dtype} and k of type {k.dtype}; q of "
            f"{' or '.join(_Q_DTYPES)} and k of {', '.join(_K_DTYPES)} are served"
        )
    K, H = k.shape[3:]
    if H % kernels.LANES or H > 2 * kernels.LANES:
        raise dispatch.Unsupported(f"pallas_tpu: head dim {H}; 128 and 256 are served")
    if K not in _KV_HEADS:
        raise dispatch.Unsupported(
            f"pallas_tpu: {K} key and value heads; {', '.join(map(str, _KV_HEADS))} are served"
        )
    if K * rows > _MOST_ROWS:
        raise dispatch.Unsupported(
            f"pallas_tpu: {q.shape[1]} rows of {q.shape[2]} heads; up to {_MOST_ROWS} rows of all "
            "heads are served"
        )


def _ranges(begin: jax.Array, end: jax.Array, layer: jax.Array, block: int):
    """The scalars of the kernels, and how many blocks the longest range has."""
    first = begin // block
    last = jnp.max(end, axis=1)
    counts = jnp.where(last > begin, (last + block - 1) // block - first, 0)
    return (layer[None], first, counts, begin), jnp.maximum(jnp.max(counts), 1)
