# SPDX-License-Identifier: Apache-2.0
"""The best-scored slots of a range, in the order of the cache."""

import jax
import jax.numpy as jnp

from ops import _top_tokens_reference, _top_tokens_triton, _top_tokens_xla, dispatch


def top_tokens(
    scores: jax.Array,  # [..., S]
    k: int,
    *,
    begin: jax.Array,  # [...] int32
    end: jax.Array,  # [...] int32
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The k best of the slots begin <= j < end, all of them where they are fewer.

    Exact, also in ties: of equal scores the lower slot wins (0.0 and -0.0 are equal). -inf is a
    score like any other, so a slot of -inf is picked only when nothing better is left. NaN inside
    the range is undefined; what lies outside the range, and the part of the range outside the
    array, has no influence.

    Args:
      scores: floating point, of at most 32 bits.
      k: at least 1; may be larger than S.
      implementation: a name from `dispatch.IMPLEMENTATIONS`. "reference" sorts all slots.

    Returns:
      indices [..., k] int32, ascending, S from counts on; counts [...] int32.

    Raises:
      ValueError: shapes or types that do not fit together.
      dispatch.Unsupported: the named implementation cannot serve the call.
    """
    if scores.ndim < 1 or 0 in scores.shape:
        raise ValueError(f"scores must be [..., S], no dimension 0, got {scores.shape}")
    if not jnp.issubdtype(scores.dtype, jnp.floating) or scores.dtype.itemsize > 4:
        raise ValueError(f"scores must be floating point of at most 32 bits, got {scores.dtype}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    leading, num_slots = scores.shape[:-1], scores.shape[-1]
    for name, bound in (("begin", begin), ("end", end)):
        if bound.shape != leading or not jnp.issubdtype(bound.dtype, jnp.integer):
            raise ValueError(f"{name} must be {leading} integers, got {bound.shape} {bound.dtype}")
    indices, counts = dispatch.dispatch(
        "top_tokens",
        implementation,
        {
            "reference": _top_tokens_reference.top_tokens,
            "xla": _top_tokens_xla.top_tokens,
            "triton": _top_tokens_triton.top_tokens,
        },
        scores.astype(jnp.float32).reshape(-1, num_slots),
        int(k),
        jnp.clip(begin.astype(jnp.int32), 0, num_slots).reshape(-1),
        jnp.clip(end.astype(jnp.int32), 0, num_slots).reshape(-1),
    )
    return indices.reshape(*leading, k), counts.reshape(leading)
