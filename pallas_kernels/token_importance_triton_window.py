# SPDX-License-Identifier: Apache-2.0
"""Attention weights of many query rows over cached keys, put together per slot, in Triton.

The keys are read twice, and nothing of size N x S is kept: `window_lse` (rows stay, keys pass by)
finds the log-sum-exp of every row, `window_vote` (keys stay, rows and heads pass by) takes the
products again and puts the weights together.

Roofline: 4 W N H operations a slot on the tensor cores, so from a few dozen rows on they limit, not
the keys' bytes.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import selection_triton_config as configs
from pallas_kernels import selection_triton_keys as cached
from pallas_kernels import triton_call


@triton.jit
def _window_products(
    queries, k, k_scale, start, S, scale,
    STRIDE: tl.constexpr, H: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr,
    SCALED: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK] products with the keys from `start` on."""
    a, b, c, unit = queries
    inside = tl.minimum(tl.arange(0, BLOCK), S - 1 - start)
    begins = start.to(tl.int64)
    keys = tl.trans(cached.load_keys(k + begins * STRIDE, inside, STRIDE, H, CODES, NATIVE))
    products = tl.zeros([a.shape[0], BLOCK], tl.float32)
    products = cached.dot(a, keys, products, "ieee")
    if TERMS > 1:
        products = cached.dot(b, keys, products, "ieee")
    if TERMS > 2:
        products = cached.dot(c, keys, products, "ieee")
    products *= (unit * scale)[:, None]
    if SCALED:
        key_scales = tl.load(k_scale + (begins + inside) * (STRIDE // H))
        products *= key_scales.to(tl.float32)[None, :]
    return products


@triton.jit
def window_lse(
    q, k, k_scale, layer, begin, end, S, splits, scale,
    largest_of, total_of,
    B: tl.constexpr, W: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    MODULO: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr, SCALED: tl.constexpr,
    TYPE: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """largest_of, total_of [B, W, N, splits]: a program takes ROWS of the rows of a KV head, which
    are those of the window for each of its query heads, over one part of the keys."""
    G: tl.constexpr = N // K
    tiles: tl.constexpr = (W * G + ROWS - 1) // ROWS
    program = tl.program_id(0)
    tile = program % tiles
    split = program // tiles % splits
    key_head = program // (tiles * splits) % K
    sequence = program // (tiles * splits * K)
    rows = tile * ROWS + tl.arange(0, ROWS)
    real = rows < W * G
    window = rows // G
    heads = cached.heads_of(key_head, rows % G, G, K, MODULO)
    low = tl.load(begin + sequence)
    ends = tl.load(end + sequence * W + window, mask=real, other=0)
    layered = tl.load(layer).to(tl.int64) * B + sequence
    k += layered * S * (K * H) + key_head * H
    k_scale += layered * S * K + key_head
    place = (sequence * W + window) * N + heads
    queries = cached.load_queries(q, place * H, real, H, TYPE, TERMS)

    first, last = low // BLOCK, tl.cdiv(tl.max(ends, 0), BLOCK)
    share = tl.cdiv(tl.maximum(last - first, 0), splits)
    first += split * share
    last = tl.minimum(first + share, last)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for block in range(first, last):
        start = block * BLOCK
        products = _window_products(
            queries, k, k_scale, start, S, scale, K * H, H, CODES, NATIVE, SCALED, TERMS, BLOCK
        )
        slots = start + tl.arange(0, BLOCK)
        seen = (slots[None, :] >= low) & (slots[None, :] < ends[:, None])
        products = tl.where(seen, products, float("-inf"))
        higher = tl.maximum(largest, tl.max(products, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(products - base[:, None])
        total = total * tl.exp(largest - base) + tl.sum(weights, 1)
        largest = higher
    place = place.to(tl.int64) * splits + split
    tl.store(largest_of + place, largest, mask=real)
    tl.store(total_of + place, total, mask=real)


@triton.jit
def window_vote(
    q, k, k_scale, layer, begin, end, lse, row_weights, head_weights, S, scale,
    out,
    B: tl.constexpr, W: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    OUTPUTS: tl.constexpr, WINDOW: tl.constexpr, MODULO: tl.constexpr, CODES: tl.constexpr,
    NATIVE: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr, TERMS: tl.constexpr,
    NORMALIZE: tl.constexpr, BY_ROW: tl.constexpr, BY_HEAD: tl.constexpr, REDUCE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, OUTPUTS, S]: a program takes a block of slots, and all rows that are put together.
    WINDOW is a power of two that W fits in."""
    G: tl.constexpr = N // K
    # those that share a KV head and an output: a query head alone, or all of them
    GROUP: tl.constexpr = 1 if OUTPUTS == N else G
    tiles: tl.constexpr = (W * GROUP + ROWS - 1) // ROWS
    TURNS: tl.constexpr = K if OUTPUTS == 1 else 1
    program = tl.program_id(0)
    number = tl.cdiv(S, BLOCK)
    output = program % OUTPUTS
    start = program // OUTPUTS % number * BLOCK
    sequence = program // (OUTPUTS * number)
    low = tl.load(begin + sequence)
    window = tl.arange(0, WINDOW)
    all_ends = tl.load(end + sequence * W + window, mask=window < W, other=0)
    high = tl.max(all_ends, 0)
    slots = start + tl.arange(0, BLOCK)
    seen_by_some = (slots >= low) & (slots < high)
    nothing = 0.0 if NORMALIZE else float("-inf")
    result = tl.full([BLOCK], 0.0 if REDUCE != "max" else float("-inf"), tl.float32)
    layered = tl.load(layer).to(tl.int64) * B + sequence
    k += layered * S * (K * H)
    k_scale += layered * S * K
    steps = TURNS * tiles
    if (start >= high) | (start + BLOCK <= low):
        steps = 0
    for step in range(0, steps):
        key_head = step // tiles
        rows = step % tiles * ROWS + tl.arange(0, ROWS)
        real = rows < W * GROUP
        if OUTPUTS == N:
            heads = output + rows * 0
            if MODULO:
                key_head = output % K
            else:
                key_head = output // G
        else:
            if OUTPUTS == K:
                key_head = output
            heads = cached.heads_of(key_head, rows % GROUP, G, K, MODULO)
        row = sequence * W + rows // GROUP
        place = row * N + heads
        ends = tl.load(end + row, mask=real, other=0)
        queries = cached.load_queries(q, place * H, real, H, TYPE, TERMS)
        products = _window_products(
            queries, k + key_head * H, k_scale + key_head, start, S, scale, K * H, H, CODES,
            NATIVE, SCALED, TERMS, BLOCK,
        )  # fmt: skip
        seen = real[:, None] & (slots[None, :] >= low) & (slots[None, :] < ends[:, None])
        if NORMALIZE:
            base = tl.load(lse + place, mask=real, other=0.0)
            base = tl.where(base == float("-inf"), 0.0, base)
            products = tl.exp(tl.where(seen, products - base[:, None], float("-inf")))
        weight = cached.load_weights(head_weights, heads, real, BY_HEAD)
        if BY_ROW:
            weight *= tl.load(row_weights + row, mask=real, other=0.0)
        products *= weight[:, None]
        if REDUCE == "max":
            given = tl.where(seen, products, float("-inf"))
            result = tl.maximum(result, tl.max(given, 0))
        else:
            result += tl.sum(tl.where(seen, products, 0.0), 0)
    if REDUCE == "mean":
        rows_that_see = tl.sum((all_ends > low).to(tl.int32), 0)
        result = result / (tl.maximum(rows_that_see, 1) * (N // OUTPUTS)).to(tl.float32)
    result = tl.where(seen_by_some, result, nothing)
    out += (sequence.to(tl.int64) * OUTPUTS + output) * S
    tl.store(out + slots, result, mask=slots < S)


def many_rows(
    q: jax.Array,  # [B, W, N, H]
    keys: cached.Keys,
    together: cached.Together,
    return_lse: bool,
    capability: int,
) -> tuple[jax.Array, jax.Array | None]:
    """Scores [B, outputs, S] float32, and the log-sum-exp [B, W, N] with `return_lse`."""
    B, W, N, H = q.shape
    S, K = keys.k.shape[2:4]
    config = configs.config("window", capability, H, keys.k.dtype.itemsize)
    constants = cached.constants(q, keys, together.modulo, capability)
    # a query in several terms takes several times the registers
    rows = config.rows if constants["TERMS"] == 1 else max(16, config.rows // 2)
    shared = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "capability": capability,
        "W": W,
        "ROWS": rows,
        "BLOCK": config.block,
        **constants,
    }
    arrays, scale = cached.arrays(q, keys), cached.scale_argument(keys, capability)
    lse = None
    if together.normalize or return_lse:
        programs = B * K * -(-W * (N // K) // rows)
        splits = max(1, min(configs.PROGRAMS // programs, S // config.block, 64))
        partial = jax.ShapeDtypeStruct((B, W, N, splits), jnp.float32)
        largest, total = triton_call.triton_call(
            window_lse,
            *arrays,
            S,
            splits,
            scale,
            out_shape=(partial, partial),
            grid=(programs * splits,),
            name="token_importance_window_lse",
            **shared,
        )
        top = jnp.max(largest, -1)
        base = jnp.where(top == -jnp.inf, 0.0, top)
        lse = base + jnp.log(jnp.sum(total * jnp.exp(largest - base[..., None]), -1))
    (scores,) = triton_call.triton_call(
        window_vote,
        *arrays,
        keys.begin if lse is None else lse,
        *cached.weights(keys, together),
        S,
        scale,
        out_shape=(jax.ShapeDtypeStruct((B, together.outputs, S), jnp.float32),),
        grid=(B * -(-S // config.block) * together.outputs,),
        name="token_importance_window_vote",
        WINDOW=triton.next_power_of_2(W),
        **cached.reductions(together),
        **shared,
    )
    return scores, lse if return_lse else None
