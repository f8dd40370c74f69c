# SPDX-License-Identifier: Apache-2.0
"""gathered_attention on CUDA GPUs from Ampere on, in Triton."""

import jax

from ops import _selection_triton, dispatch
from ops._varying import common_varying, varying_like

_TYPES = ("bfloat16", "float16", "float32")


def gathered_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [L, B, S, K, H]
    v: jax.Array,  # [L, B, S, K, H]
    indices: jax.Array,  # [B, M] or [B, K, M] int32
    counts: jax.Array,  # [B] or [B, K] int32
    lengths: jax.Array,  # [B] int32
    layer: jax.Array,  # [] int32
    rope: tuple[jax.Array, jax.Array] | None,  # each [B or 1, K or 1, M, H/2] float32
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    capability = _selection_triton.capability()
    _selection_triton.check_types(q.shape[3], _TYPES, q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise dispatch.Unsupported(
            f"triton: q, k and v of types {q.dtype}, {k.dtype} and {v.dtype}; the same type for "
            "all three is served"
        )
    # imports triton, which machines without a GPU need not have
    from pallas_kernels import gathered_attention_triton as kernels

    arrays = (q, k, v, indices, counts, lengths, layer.reshape(1), rope)
    q, k, v, indices, counts, lengths, layer, rope = common_varying(arrays)
    lists = kernels.Lists(indices, counts, lengths, layer, rope)
    return varying_like(kernels.gathered_attention(q, k, v, lists, scale, capability), q)
