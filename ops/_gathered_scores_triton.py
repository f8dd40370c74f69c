# SPDX-License-Identifier: Apache-2.0
"""gathered_scores on CUDA GPUs from Ampere on, in Triton."""

import jax

from ops import _selection_triton
from ops._varying import common_varying, varying_like

_TYPES = ("bfloat16", "float16", "float32")


def gathered_scores(
    q: jax.Array,  # [B, 1, N, H]
    k: jax.Array,  # [L, B, S, K, H]
    indices: jax.Array,  # [B, M] or [B, K, M] int32
    counts: jax.Array,  # [B] or [B, K] int32
    layer: jax.Array,  # [] int32
    *,
    scale: float,
    gqa: str,
) -> jax.Array:  # [B, N, M]
    capability = _selection_triton.capability()
    _selection_triton.check_types(q.shape[3], _TYPES, q=q, k=k)
    # imports triton, which machines without a GPU need not have
    from pallas_kernels import gathered_scores_triton

    q, k, indices, counts, layer = common_varying((q, k, indices, counts, layer.reshape(1)))
    scores = gathered_scores_triton.gathered_scores(
        q, k, indices, counts, layer, scale, gqa == "modulo", capability
    )
    return varying_like(scores, q)
