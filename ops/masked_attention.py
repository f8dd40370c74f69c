# SPDX-License-Identifier: Apache-2.0
"""Exact attention under a `Visibility`, forward and backward: training, packing and prefill."""

import jax

from ops import (
    _heads,
    _masked_attention_mosaic,
    _masked_attention_reference,
    _masked_attention_tpu,
    _masked_attention_triton,
    _masked_attention_xla,
    _saved,
    dispatch,
)
from ops.visibility import Visibility

# what a rematerialisation policy finds the results by (`jax.ad_checkpoint.checkpoint_name`)
SAVED = _saved.ATTENTION


def masked_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    visibility: Visibility,  # over the S keys of each of the B sequences
    *,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale q k^T under `visibility`) v, with grouped key and value heads.

    Query head h reads key and value head h // (N // K). T and S are free (`visibility.row_offset`
    places the rows when T < S), and so is H. Scores, softmax and sums are float32, whatever the
    inputs are.

    Batch and heads may be sharded, under jit or `jax.shard_map`; the loops over blocks of rows and
    keys are not partitioned.

    Args:
      q, k, v: floating point; differentiable.
      visibility: not differentiable.
      scale: a Python number, H ** -0.5 by default.
      return_lse: also return the log-sum-exp of every row's scores; its gradient is supported, so
        partial results can be merged (`merge_attention`) inside a loss.
      implementation: a name from `dispatch.IMPLEMENTATIONS`. "reference" keeps the dense [B, N, T,
        S] scores; "xla" keeps blocks of them, skips the blocks that no row of the batch needs and
        recomputes in the backward pass, so its memory grows with T + S, as that of the kernels:
        "mosaic_gpu" (Hopper; bfloat16 and float16), "triton" (CUDA GPUs from sm80 on; float32 too)
        and "pallas_tpu" (bfloat16 and float32), for head dims 64, 128 and 256.

    Returns:
      out [B, T, N, H] in q.dtype, and with `return_lse` also lse [B, T, N] float32. A row that sees
      nothing gives zeros, lse -inf and zero gradients.

    Raises:
      ValueError: shapes or types that do not fit together.
      dispatch.Unsupported: the named implementation cannot serve the call.
    """
    _check(q, k, v, visibility)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse = dispatch.dispatch(
        "masked_attention",
        implementation,
        {
            "reference": _masked_attention_reference.masked_attention,
            "xla": _masked_attention_xla.masked_attention,
            "pallas_tpu": _masked_attention_tpu.masked_attention,
            "mosaic_gpu": _masked_attention_mosaic.masked_attention,
            "triton": _masked_attention_triton.masked_attention,
        },
        q,
        k,
        v,
        visibility,
        scale=scale,
    )
    return (out, lse) if return_lse else out


def _check(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> None:
    _heads.check(q, k, v)
    visibility.check()
    if visibility.until.shape != k.shape[:2]:
        raise ValueError(
            f"visibility is over {visibility.until.shape} (sequences, keys), k has {k.shape[:2]}"
        )
