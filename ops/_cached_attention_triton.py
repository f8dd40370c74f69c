# SPDX-License-Identifier: Apache-2.0
"""cached_attention on CUDA GPUs in Triton: chunks by the kernel of masked attention, a few new
tokens by that of pool attention, which shares the filled slots among programs and reads every key
and value once for all rows. One thread owns every slot there, and row t forked after its own."""

import functools

import jax
import jax.numpy as jnp

from ops import _cached_attention_masked as masked
from ops import _masked_attention_triton, _pool_attention_triton
from ops._cached_attention_reference import row_slots

_chunk = functools.partial(masked.served, "triton", _masked_attention_triton.masked_attention)


def cached_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [L, B, S, K, H]
    v: jax.Array,  # [L, B, S, K, H]
    lengths: jax.Array,  # [B] int32
    layer: jax.Array,  # [] int32
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, H], [B, T, N]
    if q.shape[1] >= masked.LEAST_ROWS:
        return _chunk(q, k, v, lengths, layer, scale=scale)
    owners = jnp.zeros(k.shape[1:3], jnp.int32)
    rows = q.shape[:2]
    return _pool_attention_triton.pool_attention(
        q,
        k,
        v,
        owners,
        threads=jnp.full(rows, -1, jnp.int32),
        joined=jnp.zeros(rows, jnp.int32),
        forks=row_slots(lengths, rows[1]) + 1,
        lengths=lengths,
        layer=layer,
        scale=scale,
    )
