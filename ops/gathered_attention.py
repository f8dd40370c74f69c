# SPDX-License-Identifier: Apache-2.0
"""Attention of the newest tokens of each sequence over selected slots of a cache."""

import jax
import jax.numpy as jnp

from ops import (
    _gathered_attention_reference,
    _gathered_attention_tpu,
    _gathered_attention_triton,
    _gathered_attention_xla,
    _heads,
    _stacked,
    dispatch,
)


def gathered_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H], or [L, B, S, K, H] with layer
    v: jax.Array,  # as k
    indices: jax.Array,  # [B, M] int32, or [B, K, M]
    *,
    counts: jax.Array,  # [B] int32, or [B, K]
    lengths: jax.Array,  # [B] int32
    layer: int | jax.Array | None = None,  # [] int32
    rope: tuple[jax.Array, jax.Array] | None = None,  # each [B or 1, K or 1, M, H/2]
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Decode (T = 1) or chunk (T > 1) attention over the slots that `indices` lists.

    Row t of sequence b sits in slot lengths[b] - T + t, as in `cached_attention`, and sees the
    listed slots up to its own; a slot listed twice counts twice. Listing the slots 0 ..
    lengths[b] - 1 gives `cached_attention`. The order of the list matters to `rope` only.

    Batch and heads may be sharded under `jax.shard_map`. Not differentiable.

    Args:
      q, k, v: floating point of 16 bits or more; the cache may have another dtype than q. Query
        head h reads head h // (N // K). Only the listed slots of the one layer are read.
      indices: one list per sequence, shared by the heads, or one per KV head.
      counts: so many first entries of a list are valid, at most M. The valid ones lie in 0 .. S -
        1, the others may be anything.
      lengths: filled slots, the T new tokens included.
      layer: which layer of stacked k and v.
      rope: cos and sin, float32; entry i of the list is rotated by row i of the table when it is
        read, half against half as `lm.layers.apply_rope` does, in float32 and rounded to k.dtype.
        q comes rotated.
      scale: a Python number, H ** -0.5 by default.
      return_lse: also return the log-sum-exp of every row's scores.
      implementation: a name from `dispatch.IMPLEMENTATIONS`. "reference" scores all entries at
        once; "xla" gathers them and attends by blocks.

    Returns:
      out [B, T, N, H] in q.dtype, and with `return_lse` also lse [B, T, N] float32. A row that sees
      nothing gives zeros and lse -inf.

    Raises:
      ValueError: shapes or types that do not fit together.
      dispatch.Unsupported: the named implementation cannot serve the call.
    """
    k = _stacked.stacked("k", k, layer, "B S K H")
    v = _stacked.stacked("v", v, layer, "B S K H")
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"k and v have {k.shape[0]} and {v.shape[0]} layers")
    _heads.check(q, *(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (k, v)))
    if 1 in (k.dtype.itemsize, v.dtype.itemsize):
        raise ValueError(f"k and v must have 16 bits or more, got {k.dtype} and {v.dtype}")
    _check_lists(q, k, indices, counts, lengths)
    if rope is not None:
        rope = _checked_rope(rope, q, k, indices)
    out, lse = dispatch.dispatch(
        "gathered_attention",
        implementation,
        {
            "reference": _gathered_attention_reference.gathered_attention,
            "xla": _gathered_attention_xla.gathered_attention,
            "pallas_tpu": _gathered_attention_tpu.gathered_attention,
            "triton": _gathered_attention_triton.gathered_attention,
        },
        q,
        k,
        v,
        indices.astype(jnp.int32),
        counts.astype(jnp.int32),
        lengths.astype(jnp.int32),
        _stacked.layer_index(layer),
        rope,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    )
    return (out, lse) if return_lse else out


def _check_lists(
    q: jax.Array, k: jax.Array, indices: jax.Array, counts: jax.Array, lengths: jax.Array
) -> None:
    (B, T), (S, K) = q.shape[:2], k.shape[2:4]
    if indices.ndim not in (2, 3) or indices.shape[:-1] not in ((B,), (B, K)):
        raise ValueError(f"indices must be [{B}, M] or [{B}, {K}, M], got {indices.shape}")
    if indices.shape[-1] < 1 or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"indices must be at least one integer per list, got {indices.shape} {indices.dtype}"
        )
    for name, array, shape in (("counts", counts, indices.shape[:-1]), ("lengths", lengths, (B,))):
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be {shape} integers, got {array.shape} {array.dtype}")
    if T > S:
        raise ValueError(f"{T} new tokens do not fit a cache of {S} slots")


def _checked_rope(rope, q: jax.Array, k: jax.Array, indices: jax.Array):
    B, K, M, H = q.shape[0], k.shape[3], indices.shape[-1], q.shape[3]
    if len(rope) != 2 or H % 2:
        raise ValueError(f"rope is (cos, sin) for an even head dim, got {len(rope)} for {H}")
    cos, sin = rope
    if (
        cos.shape != sin.shape
        or cos.ndim != 4
        or cos.shape[0] not in (1, B)
        or cos.shape[1] not in (1, K)
        or cos.shape[2:] != (M, H // 2)
    ):
        raise ValueError(
            f"cos and sin must be [1 or {B}, 1 or {K}, {M}, {H // 2}], got {cos.shape} and "
            f"{sin.shape}"
        )
    return cos.astype(jnp.float32), sin.astype(jnp.float32)
