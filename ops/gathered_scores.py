# SPDX-License-Identifier: Apache-2.0
"""Scaled products of one query row with listed slots of a cache, by which candidates are ranked."""

import jax
import jax.numpy as jnp

from ops import (
    _gathered_scores_reference,
    _gathered_scores_triton,
    _gathered_scores_xla,
    _stacked,
    dispatch,
)
from ops.token_importance import GQA


def gathered_scores(
    q: jax.Array,  # [B, 1, N, H]
    k: jax.Array,  # [B, S, K, H], or [L, B, S, K, H] with layer
    indices: jax.Array,  # [B, M] int32, or [B, K, M]
    *,
    counts: jax.Array,  # [B] int32, or [B, K]
    layer: int | jax.Array | None = None,  # [] int32
    scale: float | None = None,
    gqa: str = "grouped",
    implementation: str | None = None,
) -> jax.Array:  # [B, N, M]
    """scale q k^T of the slots that `indices` lists; float32, -inf from `counts` on.

    Token selection with an 8-bit copy of the keys picks more candidates than it keeps, and ranks
    those by their true keys. Not differentiable.

    Args:
      q, k: floating point, of 16 bits or more; products are as exact as those of the wider type.
        Only the listed slots of the one layer are read.
      indices: one list per sequence, shared by the heads, or one per KV head.
      counts: so many first entries of a list are valid, at most M. The valid ones lie in 0 .. S -
        1, the others may be anything.
      layer: which layer of stacked k.
      scale: a Python number, H ** -0.5 by default.
      gqa: query head h reads KV head h // (N // K) ("grouped"), or h % K ("modulo").
      implementation: a name from `dispatch.IMPLEMENTATIONS`.

    Raises:
      ValueError: shapes, types or settings that do not fit together.
      dispatch.Unsupported: the named implementation cannot serve the call.
    """
    if gqa not in GQA:
        raise ValueError(f"gqa must be one of {', '.join(GQA)}, got {gqa!r}")
    k = _stacked.stacked("k", k, layer, "B S K H")
    _check(q, k, indices, counts)
    return dispatch.dispatch(
        "gathered_scores",
        implementation,
        {
            "reference": _gathered_scores_reference.gathered_scores,
            "xla": _gathered_scores_xla.gathered_scores,
            "triton": _gathered_scores_triton.gathered_scores,
        },
        q,
        k,
        indices.astype(jnp.int32),
        counts.astype(jnp.int32),
        _stacked.layer_index(layer),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        gqa=gqa,
    )


def _check(q: jax.Array, k: jax.Array, indices: jax.Array, counts: jax.Array) -> None:
    shapes = f"q {q.shape}, k {k.shape[1:]}"
    if q.ndim != 4 or (q.shape[0], q.shape[3]) != (k.shape[1], k.shape[4]):
        raise ValueError(f"q [B, 1, N, H] and k [B, S, K, H] do not fit together: {shapes}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"every dimension must be at least 1: {shapes}")
    if q.shape[1] != 1:
        raise ValueError(f"one query row a sequence, got {q.shape[1]}")
    if q.shape[2] % k.shape[3]:
        raise ValueError(f"query heads must be a multiple of key and value heads: {shapes}")
    for name, array in (("q", q), ("k", k)):
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize == 1:
            raise ValueError(f"{name} must be floating point of 16 bits or more, got {array.dtype}")
    B, K = k.shape[1], k.shape[3]
    if indices.ndim not in (2, 3) or indices.shape[:-1] not in ((B,), (B, K)):
        raise ValueError(f"indices must be [{B}, M] or [{B}, {K}, M], got {indices.shape}")
    if indices.shape[-1] < 1 or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"indices must be at least one integer per list, got {indices.shape} {indices.dtype}"
        )
    if counts.shape != indices.shape[:-1] or not jnp.issubdtype(counts.dtype, jnp.integer):
        raise ValueError(
            f"counts must be {indices.shape[:-1]} integers, got {counts.shape} {counts.dtype}"
        )
