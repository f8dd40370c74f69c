# SPDX-License-Identifier: Apache-2.0
"""Candidates chosen by approximate scores, ranked again by their true keys."""

import jax
import jax.numpy as jnp

from ops.gathered_scores import gathered_scores
from ops.top_tokens import top_tokens


def rescore_tokens(
    q: jax.Array,  # [B, 1, N, H]
    k: jax.Array,  # [B, S, K, H], or [L, B, S, K, H] with layer
    candidates: jax.Array,  # [B, M] int32, or [B, K, M]
    number: int,
    *,
    counts: jax.Array,  # [B] int32, or [B, K]
    lse: jax.Array | None,  # [B, 1, N] float32
    layer: int | jax.Array | None = None,  # [] int32
    scale: float | None = None,
    head_weights: jax.Array | None = None,  # [N]
    gqa: str = "grouped",
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The `number` best of the candidates by the sum over heads of exp(product - lse), a soft vote.

    The exact log-sum-exp of a head would take a pass over all keys, so that of the approximate pass
    stands in for it (`token_importance(..., return_lse=True)`). Its error shifts the weight of a
    head against the others, by as much for all tokens.

    Args:
      candidates, counts: as `top_tokens` returns them: ascending, valid up to counts. Lists per KV
        head are ranked by the votes of its query heads.
      lse: None ranks by the sum of the products themselves.
      scale, gqa, head_weights: as in `token_importance`.

    Returns:
      indices [..., number] int32, ascending, S from counts on; counts [...] int32.

    Raises:
      ValueError, dispatch.Unsupported: as `gathered_scores` and `top_tokens`.
    """
    scores = gathered_scores(
        q, k, candidates, counts=counts, layer=layer, scale=scale, gqa=gqa,
        implementation=implementation,
    )  # fmt: skip
    B, N, M = scores.shape
    votes = scores if lse is None else jnp.exp(scores - lse[:, 0, :, None])
    if head_weights is not None:
        votes = votes * head_weights.astype(jnp.float32)[None, :, None]
    if candidates.ndim == 2:
        votes = jnp.sum(votes, axis=1)
    else:
        K = candidates.shape[1]
        shape, axis = ((B, K, N // K, M), 2) if gqa == "grouped" else ((B, N // K, K, M), 1)
        votes = jnp.sum(votes.reshape(shape), axis=axis)
    places, found = top_tokens(
        votes, number, begin=jnp.zeros_like(counts), end=counts, implementation=implementation
    )
    num_slots = k.shape[-3]
    chosen = jnp.take_along_axis(candidates, jnp.minimum(places, M - 1), axis=-1)
    return jnp.where(places < M, chosen, num_slots).astype(jnp.int32), found
