# SPDX-License-Identifier: Apache-2.0
"""token_importance on CUDA GPUs from Ampere on, in Triton: what is served, and by which kernels."""

import jax
import jax.numpy as jnp

from ops import _selection_triton, dispatch
from ops._varying import common_varying, varying_like

_FLOATS = ("bfloat16", "float16", "float32")
_CODES = {"int8": "int8", "float8_e4m3fn": "float8"}
_MOST_ROWS = 4096  # ends of a window's rows are loaded at once


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
    capability = _selection_triton.capability()
    _selection_triton.check_types(q.shape[3], _FLOATS, q=q)
    _selection_triton.check_types(q.shape[3], (*_FLOATS, *_CODES), k=k)
    if q.shape[1] > _MOST_ROWS:
        raise dispatch.Unsupported(f"triton: {q.shape[1]} rows; up to {_MOST_ROWS} are served")
    # imports triton, which machines without a GPU need not have
    from pallas_kernels import selection_triton_keys as cached
    from pallas_kernels import token_importance_triton, token_importance_triton_window

    arrays = (q, k, begin, end, layer.reshape(1), k_scale, row_weights, head_weights)
    q, k, begin, end, layer, k_scale, row_weights, head_weights = common_varying(arrays)
    codes = _CODES.get(k.dtype.name, "")
    if codes == "float8":
        k = jax.lax.bitcast_convert_type(k, jnp.int8)
    (N, K) = q.shape[2], k.shape[3]
    outputs = {"all": 1, "kv": K, "query": N}[heads]
    keys = cached.Keys(k, k_scale, layer, begin, end, codes, scale)
    together = cached.Together(
        row_weights, head_weights, reduce, outputs, gqa == "modulo", normalize
    )
    one = q.shape[1] == 1
    serve = token_importance_triton.one_row if one else token_importance_triton_window.many_rows
    scores, lse = varying_like(serve(q, keys, together, return_lse, capability), q)
    return (scores[:, 0] if heads == "all" else scores), lse
