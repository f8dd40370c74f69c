# SPDX-License-Identifier: Apache-2.0
"""Attention weights of one query row a sequence (decoding, or the mean query of a chunk) over its
cached keys, put together per slot, in Triton. The keys are read once.

  scan        a program walks a few blocks of slots of a KV head. The G query heads of the head are
              one tile, padded to 16 for the tensor cores. What is kept of a block: its largest
              product per head, the sum of exp(product - largest), and those exponentials themselves
              ([B, N, S], or the products where nothing is normalised).
  normalizer  largest and sums of the blocks become the log-sum-exp of a head.
  vote        exponentials times exp(largest - log-sum-exp), summed over heads. Blocks come in
              reverse, so that those written last are still in the cache.

Roofline: bytes of the keys, plus twice 4 N bytes a slot (2 N where keys are codes,
whose own rounding is far above that of float16). At N = 32, K = 8, H = 128 in bfloat16 and 512K
slots: 1.07 GB of keys and 2 x 67 MB.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import selection_triton_config as configs
from pallas_kernels import selection_triton_keys as cached
from pallas_kernels import triton_call


@triton.jit
def scan(
    q, k, k_scale, layer, begin, end, S, width, blocks, scale,
    kept, largest_of, total_of,
    B: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr,
    MODULO: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr, SCALED: tl.constexpr,
    TYPE: tl.constexpr, TERMS: tl.constexpr, STATISTICS: tl.constexpr, EXPONENTIALS: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """kept [B, N, width]; largest_of, total_of [B, N, blocks] of the blocks between begin and end,
    the others are not written."""
    G: tl.constexpr = N // K
    spans = tl.cdiv(blocks, STEPS)
    program = tl.program_id(0)
    first_head = program % (K // HEADS) * HEADS
    span = (program // (K // HEADS)) % spans
    sequence = program // (K // HEADS * spans)
    low, high = tl.load(begin + sequence), tl.load(end + sequence)
    first = tl.maximum(low // BLOCK, span * STEPS)
    last = tl.minimum(tl.cdiv(high, BLOCK), span * STEPS + STEPS)

    row = tl.load(layer).to(tl.int64) * B + sequence
    k += row * S * (K * H)
    k_scale += row * S * K
    members = tl.arange(0, PADDED)
    real = members < G
    q += sequence * N * H
    kept += sequence.to(tl.int64) * N * width
    largest_of += sequence.to(tl.int64) * N * blocks
    total_of += sequence.to(tl.int64) * N * blocks

    heads = cached.heads_of(first_head, members, G, K, MODULO)
    a, b, c, unit = cached.load_queries(q, heads * H, real, H, TYPE, TERMS)
    for step in range(first * HEADS, last * HEADS):
        block = step // HEADS
        key_head = first_head + step % HEADS
        if HEADS > 1:
            heads = cached.heads_of(key_head, members, G, K, MODULO)
            a, b, c, unit = cached.load_queries(q, heads * H, real, H, TYPE, TERMS)
        start = block * BLOCK
        inside = tl.minimum(tl.arange(0, BLOCK), S - 1 - start)
        begins = start.to(tl.int64)
        keys = cached.load_keys(
            k + begins * (K * H) + key_head * H, inside, K * H, H, CODES, NATIVE
        )
        products = tl.zeros([BLOCK, PADDED], tl.float32)
        products = cached.dot(keys, tl.trans(a), products, "ieee")
        if TERMS > 1:
            products = cached.dot(keys, tl.trans(b), products, "ieee")
        if TERMS > 2:
            products = cached.dot(keys, tl.trans(c), products, "ieee")
        products *= (unit * scale)[None, :]
        if SCALED:
            key_scales = tl.load(k_scale + begins * K + key_head + inside * K)
            products *= key_scales.to(tl.float32)[:, None]

        slots = start + tl.arange(0, BLOCK)
        seen = (slots >= low) & (slots < high)
        values = tl.where(seen[:, None], products, float("-inf"))
        if STATISTICS:
            largest = tl.max(values, 0)
            base = tl.where(largest == float("-inf"), 0.0, largest)
            exponentials = tl.exp(values - base[None, :])
            place = heads * blocks + block
            tl.store(largest_of + place, largest, mask=real)
            tl.store(total_of + place, tl.sum(exponentials, 0), mask=real)
            if EXPONENTIALS:
                values = exponentials
        place = heads.to(tl.int64)[None, :] * width + slots[:, None]
        tl.store(kept + place, values.to(kept.dtype.element_ty), mask=real[None, :])


@triton.jit
def normalizer(
    largest_of, total_of, begin, end, blocks, lse,
    N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """lse [B, N] of the blocks of a head."""
    program = tl.program_id(0)
    sequence = program // N
    first = tl.load(begin + sequence) // BLOCK
    last = tl.cdiv(tl.load(end + sequence), BLOCK)
    largest_of += program.to(tl.int64) * blocks
    total_of += program.to(tl.int64) * blocks
    lanes = tl.arange(0, CHUNK)
    highest = tl.full([CHUNK], float("-inf"), tl.float32)
    sums = tl.zeros([CHUNK], tl.float32)
    for start in range(first, last, CHUNK):
        inside = start + lanes < last
        largest = tl.load(largest_of + start + lanes, mask=inside, other=float("-inf"))
        total = tl.load(total_of + start + lanes, mask=inside, other=0.0)
        higher = tl.maximum(highest, largest)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(highest - base) + total * tl.exp(largest - base)
        highest = higher
    top = tl.max(highest, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(sums * tl.exp(highest - base), 0)
    tl.store(lse + program, tl.where(total > 0, base + tl.log(total), float("-inf")))


@triton.jit
def vote(
    kept, largest_of, lse, row_weights, head_weights, begin, end, S, width, blocks,
    out,
    N: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr,
    MODULO: tl.constexpr, NORMALIZE: tl.constexpr, BY_ROW: tl.constexpr, BY_HEAD: tl.constexpr,
    REDUCE: tl.constexpr, BLOCK: tl.constexpr, SCANNED: tl.constexpr,
):  # fmt: skip
    """out [B, OUTPUTS, S]: the N // OUTPUTS heads of each put together."""
    MEMBERS: tl.constexpr = N // OUTPUTS
    program = tl.program_id(0)
    number = tl.cdiv(S, BLOCK)
    block = number - 1 - program // OUTPUTS % number
    output = program % OUTPUTS
    sequence = program // (OUTPUTS * number)
    low, high = tl.load(begin + sequence), tl.load(end + sequence)
    start = block * BLOCK
    slots = start + tl.arange(0, BLOCK)
    seen = (slots >= low) & (slots < high)
    members = tl.arange(0, PADDED)
    real = members < MEMBERS
    heads = cached.heads_of(output, members, MEMBERS, K, MODULO and OUTPUTS == K)
    row = sequence * N + heads
    weight = cached.load_weights(head_weights, heads, real, BY_HEAD)
    if BY_ROW:
        weight *= tl.load(row_weights + sequence)
    if REDUCE == "mean":
        weight = weight / MEMBERS
    nothing = 0.0 if NORMALIZE else float("-inf")
    result = tl.full([BLOCK], nothing, tl.float32)
    if (start < high) & (start + BLOCK > low):
        if NORMALIZE:
            base = tl.load(lse + row, mask=real, other=0.0)
            place = row.to(tl.int64) * blocks + start // SCANNED
            largest = tl.load(largest_of + place, mask=real, other=float("-inf"))
            # a block that nobody sees, and a row that sees nothing, have no weights
            weight *= tl.where(largest == float("-inf"), 0.0, tl.exp(largest - base))
        place = row.to(tl.int64)[:, None] * width + slots[None, :]
        inside = real[:, None] & seen[None, :]
        values = tl.load(kept + place, mask=inside, other=0.0).to(tl.float32) * weight[:, None]
        if REDUCE == "max":
            values = tl.where(inside, values, float("-inf"))
            result = tl.where(seen, tl.max(values, 0), nothing)
        else:
            values = tl.where(inside, values, 0.0)
            result = tl.where(seen, tl.sum(values, 0), nothing)
    out += (sequence.to(tl.int64) * OUTPUTS + output) * S
    tl.store(out + slots, result, mask=slots < S)


def one_row(
    q: jax.Array,  # [B, 1, N, H]
    keys: cached.Keys,
    together: cached.Together,
    return_lse: bool,
    capability: int,
) -> tuple[jax.Array, jax.Array | None]:
    """Scores [B, outputs, S] float32, and the log-sum-exp [B, 1, N] with `return_lse`."""
    B, _, N, H = q.shape
    S, K = keys.k.shape[2:4]
    config = configs.config("scan", capability, H, keys.k.dtype.itemsize)
    heads = config.heads if K % config.heads == 0 else 1
    blocks = -(-S // config.block)
    width = blocks * config.block
    statistics = together.normalize or return_lse
    kept = jnp.float16 if keys.codes and together.normalize else jnp.float32
    partial = jax.ShapeDtypeStruct((B, N, blocks), jnp.float32)
    exponentials, largest, total = triton_call.triton_call(
        scan,
        *cached.arrays(q, keys),
        S,
        width,
        blocks,
        cached.scale_argument(keys, capability),
        out_shape=(jax.ShapeDtypeStruct((B, N, width), kept), partial, partial),
        grid=(B * -(-blocks // config.steps) * (K // heads),),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        capability=capability,
        name="token_importance_scan",
        PADDED=max(16, triton.next_power_of_2(N // K)),
        STATISTICS=statistics,
        EXPONENTIALS=together.normalize,
        BLOCK=config.block,
        STEPS=config.steps,
        HEADS=heads,
        **cached.constants(q, keys, together.modulo, capability),
    )
    lse = None
    if statistics:
        reduction = configs.config("normalizer", capability)
        (lse,) = triton_call.triton_call(
            normalizer,
            largest,
            total,
            keys.begin,
            keys.end,
            blocks,
            out_shape=(jax.ShapeDtypeStruct((B, 1, N), jnp.float32),),
            grid=(B * N,),
            num_warps=reduction.num_warps,
            num_stages=reduction.num_stages,
            capability=capability,
            name="token_importance_normalizer",
            N=N,
            BLOCK=config.block,
            CHUNK=reduction.block,
        )
    voting = configs.config("vote", capability)
    block = min(voting.block, config.block)
    (scores,) = triton_call.triton_call(
        vote,
        exponentials,
        largest,
        keys.begin if lse is None else lse,
        *cached.weights(keys, together),
        keys.begin,
        keys.end,
        S,
        width,
        blocks,
        out_shape=(jax.ShapeDtypeStruct((B, together.outputs, S), jnp.float32),),
        grid=(B * -(-S // block) * together.outputs,),
        num_warps=voting.num_warps,
        num_stages=voting.num_stages,
        capability=capability,
        name="token_importance_vote",
        N=N,
        K=K,
        PADDED=triton.next_power_of_2(N // together.outputs),
        BLOCK=block,
        SCANNED=config.block,
        MODULO=together.modulo,
        **cached.reductions(together),
    )
    return scores, lse if return_lse else None
