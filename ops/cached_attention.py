# SPDX-License-Identifier: Apache-2.0
"""Attention of the newest tokens of each sequence over a dense key and value cache."""

import jax
import jax.numpy as jnp

from ops import (
    _cached_attention_masked,
    _cached_attention_reference,
    _cached_attention_triton,
    _cached_attention_xla,
    _heads,
    _stacked,
    dispatch,
)


def cached_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H], or [L, B, S, K, H] with layer
    v: jax.Array,  # as k
    *,
    lengths: jax.Array,  # [B] int32
    layer: int | jax.Array | None = None,  # [] int32
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Decode (T = 1) or chunk (T > 1) attention over caches of S slots, filled to `lengths`.

    `lengths` includes the T new tokens, whose keys and values are already in the cache: row t of
    sequence b sits in slot lengths[b] - T + t and sees the slots up to its own. Rows that would sit
    before slot 0 (a sequence shorter than T) see nothing. Slots from lengths[b] on have no
    influence, whatever finite numbers they hold.

    For generation: "xla" is not differentiable (train with `masked_attention`).

    Args:
      q, k, v: floating point; the cache may have another dtype than q. Query head h reads head h //
        (N // K).
      layer: which layer of stacked k and v; steps then read it where it lies.
      scale: a Python number, H ** -0.5 by default.
      return_lse: also return the log-sum-exp of every row's scores.
      implementation: a name from `dispatch.IMPLEMENTATIONS`. "reference" scores the whole cache at
        once; "xla" reads it by blocks up to the longest sequence of the batch, without repeating K
        and V; "mosaic_gpu" and "triton" are those of `masked_attention` for chunks of 64 new tokens
        and more, "triton" is that of `pool_attention` for fewer; both want a cache of q's dtype.

    Returns:
      out [B, T, N, H] in q.dtype, and with `return_lse` also lse [B, T, N] float32. A row that sees
      nothing gives zeros and lse -inf. lengths beyond S are undefined.

    Raises:
      ValueError: shapes or types that do not fit together.
      dispatch.Unsupported: the named implementation cannot serve the call.
    """
    k = _stacked.stacked("k", k, layer, "B S K H")
    v = _stacked.stacked("v", v, layer, "B S K H")
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"k and v have {k.shape[0]} and {v.shape[0]} layers")
    _heads.check(q, k[0], v[0])
    if lengths.shape != q.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths must be {q.shape[:1]} integers, got {lengths.shape} {lengths.dtype}"
        )
    if q.shape[1] > k.shape[2]:
        raise ValueError(f"{q.shape[1]} new tokens do not fit a cache of {k.shape[2]} slots")
    out, lse = dispatch.dispatch(
        "cached_attention",
        implementation,
        {
            "reference": _cached_attention_reference.cached_attention,
            "xla": _cached_attention_xla.cached_attention,
            "mosaic_gpu": _cached_attention_masked.mosaic_gpu,
            "triton": _cached_attention_triton.cached_attention,
        },
        q,
        k,
        v,
        lengths.astype(jnp.int32),
        _stacked.layer_index(layer),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    )
    return (out, lse) if return_lse else out
