# SPDX-License-Identifier: Apache-2.0
"""How much a few queries attend to every cached token: the scores that token selection picks by."""

import jax
import jax.numpy as jnp

from ops import (
    _stacked,
    _token_importance_reference,
    _token_importance_tpu,
    _token_importance_triton,
    _token_importance_xla,
    dispatch,
)

REDUCTIONS = ("sum", "mean", "max")
HEADS = ("all", "kv", "query")
GQA = ("grouped", "modulo")
_CODES = ("int8", "float8_e4m3fn")


def token_importance(
    q: jax.Array,  # [B, W, N, H]
    k: jax.Array,  # [B, S, K, H], or [L, B, S, K, H] with layer
    *,
    begin: jax.Array,  # [B] int32
    end: jax.Array,  # [B, W] int32
    layer: int | jax.Array | None = None,  # [] int32
    k_scale: jax.Array | None = None,  # [B, S, K], or [L, B, S, K] with layer
    scale: float | None = None,
    normalize: bool = True,
    row_weights: jax.Array | None = None,  # [B, W]
    head_weights: jax.Array | None = None,  # [N]
    reduce: str = "sum",
    heads: str = "all",
    gqa: str = "grouped",
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of W query rows over the slots of a cache, put together to one score per slot.

    Row w of sequence b sees the slots begin[b] <= j < end[b, w], cut to the cache. What it gives to
    a slot it sees is its attention weight softmax(scale q k^T) over the slots that it sees
    (TokenSelect, arXiv 2411.02886, equation 8: the soft vote), or without `normalize` the scaled
    product itself (equation 7 at scale 1), times its weights. Rows and heads are put together by
    `reduce`.

    Slots outside of what a row sees have no influence, whatever finite numbers they hold. Batch and
    heads may be sharded under `jax.shard_map`; sums over all heads are then sums over the local
    ones. Not differentiable.

    Args:
      q: floating point, rotated as the caller wants it.
      k: floating point, or codes of 8 bits (int8, float8_e4m3fn). Other layers of a stack are not
        read, and the layer is not copied.
      layer: which layer of stacked k and k_scale.
      k_scale: float32 or bfloat16; the keys are k * k_scale[..., None]. int8 needs it.
      scale: a Python number, H ** -0.5 by default.
      row_weights, head_weights: real numbers; a row or head of weight 0 still counts in "mean".
      reduce: "sum", "max" (over the rows that see the slot), or "mean": the sum over (rows that see
        any slot) x (heads put together).
      heads: "all" puts all query heads together, "kv" those that read one KV head, "query" none.
      gqa: query head h reads KV head h // (N // K) ("grouped"), or h % K ("modulo"), as the
        published TokenSelect code does.
      return_lse: also return the log-sum-exp of every row's scaled products.
      implementation: a name from `dispatch.IMPLEMENTATIONS`. "reference" keeps the [B, N, W, S]
        products; "xla" takes them by blocks of slots, twice (log-sum-exp of the rows, then the
        scores), and keeps them only for W = 1.

    Returns:
      float32 [B, S], [B, K, S] ("kv") or [B, N, S] ("query"): 0 (without `normalize`: -inf) for a
      slot that no row sees. With `return_lse` also lse [B, W, N] float32, the natural logarithm;
      -inf for a row that sees nothing.

    Raises:
      ValueError: shapes, types or settings that do not fit together.
      dispatch.Unsupported: the named implementation cannot serve the call.
    """
    for name, value, known in (
        ("reduce", reduce, REDUCTIONS),
        ("heads", heads, HEADS),
        ("gqa", gqa, GQA),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    k = _stacked.stacked("k", k, layer, "B S K H")
    if k_scale is not None:
        k_scale = _stacked.stacked("k_scale", k_scale, layer, "B S K")
    _check_keys(q, k, k_scale)
    _check_rows(q, begin, end, row_weights, head_weights)
    num_slots = k.shape[2]
    scores, lse = dispatch.dispatch(
        "token_importance",
        implementation,
        {
            "reference": _token_importance_reference.token_importance,
            "xla": _token_importance_xla.token_importance,
            "pallas_tpu": _token_importance_tpu.token_importance,
            "triton": _token_importance_triton.token_importance,
        },
        q,
        k,
        jnp.clip(begin.astype(jnp.int32), 0, num_slots),
        jnp.clip(end.astype(jnp.int32), 0, num_slots),
        _stacked.layer_index(layer),
        k_scale,
        None if row_weights is None else row_weights.astype(jnp.float32),
        None if head_weights is None else head_weights.astype(jnp.float32),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        normalize=bool(normalize),
        reduce=reduce,
        heads=heads,
        gqa=gqa,
        return_lse=bool(return_lse),
    )
    return (scores, lse) if return_lse else scores


def _check_keys(q: jax.Array, k: jax.Array, k_scale: jax.Array | None) -> None:
    shapes = f"q {q.shape}, k {k.shape[1:]}"
    if q.ndim != 4 or (q.shape[0], q.shape[3]) != (k.shape[1], k.shape[4]):
        raise ValueError(f"q [B, W, N, H] and k [B, S, K, H] do not fit together: {shapes}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"every dimension must be at least 1: {shapes}")
    if q.shape[2] % k.shape[3]:
        raise ValueError(f"query heads must be a multiple of key and value heads: {shapes}")
    if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype.itemsize == 1:
        raise ValueError(f"q must be floating point of 16 bits or more, got {q.dtype}")
    wide = jnp.issubdtype(k.dtype, jnp.floating) and k.dtype.itemsize > 1
    if not wide and k.dtype.name not in _CODES:
        raise ValueError(f"k must be floating point or one of {', '.join(_CODES)}, got {k.dtype}")
    if k_scale is None:
        if k.dtype == jnp.int8:
            raise ValueError("keys of type int8 need k_scale")
        return
    if k_scale.shape != k.shape[:4]:
        raise ValueError(f"k_scale must be k's shape without H: {k_scale.shape}, k {k.shape}")
    if k_scale.dtype.name not in ("float32", "bfloat16"):
        raise ValueError(f"k_scale must be float32 or bfloat16, got {k_scale.dtype}")


def _check_rows(
    q: jax.Array,
    begin: jax.Array,
    end: jax.Array,
    row_weights: jax.Array | None,
    head_weights: jax.Array | None,
) -> None:
    B, W, N, _ = q.shape
    for name, array, shape in (("begin", begin, (B,)), ("end", end, (B, W))):
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be {shape} integers, got {array.shape} {array.dtype}")
    for name, array, shape in (
        ("row_weights", row_weights, (B, W)),
        ("head_weights", head_weights, (N,)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
