# SPDX-License-Identifier: Apache-2.0
"""Attention of the newest token of every thread of a sequence over one pool of keys and values."""

import jax
import jax.numpy as jnp

from ops import (
    _heads,
    _pool_attention_reference,
    _pool_attention_tpu,
    _pool_attention_triton,
    _pool_attention_xla,
    _stacked,
    dispatch,
)


def pool_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H], or [L, B, S, K, H] with layer
    v: jax.Array,  # as k
    *,
    owners: jax.Array,  # [B, S] int32
    threads: jax.Array,  # [B, T] int32
    joined: jax.Array,  # [B, T] int32
    forks: jax.Array,  # [B, T] int32
    lengths: jax.Array,  # [B] int32
    layer: int | jax.Array | None = None,  # [] int32
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of T rows, of a thread each, over a pool in which the entries of all threads of a
    sequence are interleaved. Row t of sequence b sees slot s < lengths[b] iff

        owners[b, s] == threads[b, t]  or  (owners[b, s] <= joined[b, t] and s < forks[b, t])

    Threads are numbered in the order of their forks, main is 0, and joins happen in that order, so
    that what a thread may read of others is all of a prefix of them, up to where it forked. Keys
    and values are read once for all rows. What is not filled has no influence, whatever finite
    numbers it holds.

    Batch and heads may be sharded under `jax.shard_map`. Not differentiable.

    Args:
      q, k, v: floating point of 16 bits or more; the pool may have another dtype than q. Query head
        h reads head h // (N // K). Only the one layer is read.
      owners: the thread that wrote a slot.
      threads, joined, forks: of each row; a row of thread -1 with joined -1 sees nothing.
      lengths: filled slots, those of the rows themselves included, at most S.
      layer: which layer of stacked k and v.
      scale: a Python number, H ** -0.5 by default.
      return_lse: also return the log-sum-exp of every row's scores.
      implementation: a name from `dispatch.IMPLEMENTATIONS`. "reference" scores the whole pool at
        once; the others read it by blocks up to the filled part.

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
    rows, slots = q.shape[:2], k.shape[1:3]
    rules = {"owners": (owners, slots), "threads": (threads, rows), "joined": (joined, rows)}
    rules |= {"forks": (forks, rows), "lengths": (lengths, rows[:1])}
    for name, (array, shape) in rules.items():
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be {shape} integers, got {array.shape} {array.dtype}")
    out, lse = dispatch.dispatch(
        "pool_attention",
        implementation,
        {
            "reference": _pool_attention_reference.pool_attention,
            "xla": _pool_attention_xla.pool_attention,
            "pallas_tpu": _pool_attention_tpu.pool_attention,
            "triton": _pool_attention_triton.pool_attention,
        },
        q,
        k,
        v,
        *(array.astype(jnp.int32) for array, _ in rules.values()),
        _stacked.layer_index(layer),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    )
    return (out, lse) if return_lse else out
