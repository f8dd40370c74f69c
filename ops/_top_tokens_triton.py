# SPDX-License-Identifier: Apache-2.0
"""top_tokens on CUDA GPUs from Ampere on, in Triton."""

import jax

from ops import _selection_triton, dispatch
from ops._varying import common_varying, varying_like

_MOST_SLOTS = 1 << 26


def top_tokens(
    scores: jax.Array,  # [R, S] float32
    k: int,
    begin: jax.Array,  # [R] int32 in 0 .. S
    end: jax.Array,  # [R] int32 in 0 .. S
) -> tuple[jax.Array, jax.Array]:
    capability = _selection_triton.capability()
    if scores.shape[1] > _MOST_SLOTS:
        raise dispatch.Unsupported(
            f"triton: {scores.shape[1]} slots; up to {_MOST_SLOTS} are served"
        )
    # imports triton, which machines without a GPU need not have
    from pallas_kernels import top_tokens_triton

    scores, begin, end = common_varying((scores, begin, end))
    return varying_like(top_tokens_triton.top_tokens(scores, k, begin, end, capability), scores)
