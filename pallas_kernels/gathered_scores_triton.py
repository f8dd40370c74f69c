# SPDX-License-Identifier: Apache-2.0
"""Products of one query row a sequence with listed keys, in Triton.

A program takes a block of a list for one KV head: 2 H contiguous bytes a token in bfloat16. Those
of all KV heads follow each other, and a shared list makes them read the same rows of the cache.

Roofline: 2560 candidates at K = 8, H = 128 are 5 MB; the two dependent reads limit.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import selection_triton_config as configs
from pallas_kernels import selection_triton_keys as cached
from pallas_kernels import triton_call


@triton.jit
def products(
    q, k, k_scale, layer, indices, counts, S, M, scale,
    out,
    B: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr,
    LISTS: tl.constexpr, MODULO: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr,
    SCALED: tl.constexpr, TYPE: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, N, M]."""
    G: tl.constexpr = N // K
    blocks = tl.cdiv(M, BLOCK)
    program = tl.program_id(0)
    key_head = program % K
    start = program // K % blocks * BLOCK
    sequence = program // (K * blocks)
    list_index = sequence * LISTS + key_head % LISTS
    entry = start + tl.arange(0, BLOCK)
    valid = entry < tl.load(counts + list_index)
    slots = tl.load(indices + list_index * M + tl.minimum(entry, M - 1), mask=valid, other=0)
    layered = (tl.load(layer).to(tl.int64) * B + sequence) * S * (K * H) + key_head * H
    members = tl.arange(0, PADDED)
    real = members < G
    heads = cached.heads_of(key_head, members, G, K, MODULO)
    a, b, c, unit = cached.load_queries(q + sequence * N * H, heads * H, real, H, TYPE, TERMS)
    keys = cached.load_keys(k + layered, slots.to(tl.int64), K * H, H, CODES, NATIVE)
    result = tl.zeros([BLOCK, PADDED], tl.float32)
    result = cached.dot(keys, tl.trans(a), result, "ieee")
    if TERMS > 1:
        result = cached.dot(keys, tl.trans(b), result, "ieee")
    if TERMS > 2:
        result = cached.dot(keys, tl.trans(c), result, "ieee")
    result = tl.where(valid[:, None], result * (unit * scale)[None, :], float("-inf"))
    place = (sequence * N + heads).to(tl.int64)[None, :] * M + entry[:, None]
    tl.store(out + place, result, mask=real[None, :] & (entry < M)[:, None])


def gathered_scores(
    q: jax.Array,  # [B, 1, N, H]
    k: jax.Array,  # [L, B, S, K, H]
    indices: jax.Array,  # [B, M] or [B, K, M] int32
    counts: jax.Array,  # [B] or [B, K] int32
    layer: jax.Array,  # [1] int32
    scale: float,
    modulo: bool,
    capability: int,
) -> jax.Array:
    """[B, N, M] float32."""
    B, _, N, _ = q.shape
    S, K = k.shape[2:4]
    M = indices.shape[-1]
    config = configs.config("candidates", capability)
    keys = cached.Keys(k, None, layer, counts, counts, "", scale)
    (scores,) = triton_call.triton_call(
        products,
        *cached.arrays(q, keys)[:4],
        indices,
        counts,
        S,
        M,
        cached.scale_argument(keys, capability),
        out_shape=(jax.ShapeDtypeStruct((B, N, M), jnp.float32),),
        grid=(B * K * -(-M // config.block),),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        capability=capability,
        name="gathered_scores",
        PADDED=max(16, triton.next_power_of_2(N // K)),
        LISTS=1 if indices.ndim == 2 else K,
        BLOCK=config.block,
        **cached.constants(q, keys, modulo, capability),
    )
    return scores
