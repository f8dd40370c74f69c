# SPDX-License-Identifier: Apache-2.0
"""Attention under a visibility mask in Triton: forward, dq, and dk with dv.

FlashAttention-2 (Dao, arXiv 2307.08691) over compacted block lists. A program holds one block of
queries of one head (forward, dq) or one block of keys of one key head (dk with dv), keeps its sums
in registers and walks the list of blocks of the other side that it needs: first the fully visible
ones, in a loop without any masking or bounds, then the partly visible ones. Blocks that reach
beyond T or S are never fully visible. The next entry of a list is loaded one step ahead, so that
the copies of the pipeline never wait for an index.

Query heads that share keys are neighbours in the grid, then come the blocks of one key head, those
that usually meet most first (late queries, early keys), then key heads and sequences. dk and dv sum
over the query heads of their group inside the program: no atomics, and keys are never repeated.

Roofline: 4 H operations per visible pair and query head forward, 6 H in dq, 8 H in dk and dv; keys
and values of a head come from L2, so the tensor cores limit.

Scores are kept in units of log 2: `qk_scale` is scale * log2(e), and the log-sum-exp between the
passes is base 2, [B, N, T].
"""

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels import triton_call
from pallas_kernels.masked_attention_triton_config import Config

LOG2_E = 1.4426950408889634


@triton.jit
def _place(blocks, BLOCKS_DESCEND: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr):
    """(sequence, key head, block, head within `HEADS`) of this program."""
    program = tl.program_id(0)
    head = program % HEADS
    block = (program // HEADS) % blocks
    if BLOCKS_DESCEND:
        block = blocks - 1 - block
    rest = program // (HEADS * blocks)
    return (rest // K).to(tl.int64), rest % K, block, head


@triton.jit
def _tile(
    pointer, start, length, stride, BLOCK: tl.constexpr, H: tl.constexpr, WHOLE: tl.constexpr
):
    """Rows start .. start + BLOCK of an array of rows of H entries, zeros from `length` on."""
    inside = tl.arange(0, BLOCK)
    place = inside[:, None] * stride + tl.arange(0, H)[None, :]
    pointer += start.to(tl.int64) * stride
    if WHOLE:
        return tl.load(pointer + place)
    return tl.load(pointer + place, mask=(start + inside < length)[:, None], other=0.0)


@triton.jit
def _store_tile(pointer, values, start, length, stride, BLOCK: tl.constexpr, H: tl.constexpr):
    inside = tl.arange(0, BLOCK)
    place = inside[:, None] * stride + tl.arange(0, H)[None, :]
    pointer += start.to(tl.int64) * stride
    values = values.to(pointer.dtype.element_ty)
    tl.store(pointer + place, values, mask=(start + inside < length)[:, None])


@triton.jit
def _vector(pointer, start, length, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    place = start + tl.arange(0, BLOCK)
    if WHOLE:
        return tl.load(pointer + place)
    return tl.load(pointer + place, mask=place < length, other=0)


@triton.jit
def _runs(until, hidden_from, hidden_until, start, S, BLOCK: tl.constexpr, HIDDEN: tl.constexpr):
    """The three vectors of a block of keys; keys from S on are seen by nobody."""
    end = _vector(until, start, S, BLOCK, False)
    if HIDDEN:
        gap_start = _vector(hidden_from, start, S, BLOCK, False)
        gap_end = _vector(hidden_until, start, S, BLOCK, False)
        return end, gap_start, gap_end
    return end, end, end


@triton.jit
def _sees(rows, keys, end, gap_start, gap_end, HIDDEN: tl.constexpr):
    seen = (keys <= rows) & (rows < end)
    if HIDDEN:
        seen = seen & ((rows < gap_start) | (rows >= gap_end))
    return seen


@triton.jit
def _row_index(row_offset, sequence, start, BLOCK: tl.constexpr, OFFSET: tl.constexpr):
    rows = start + tl.arange(0, BLOCK)
    if OFFSET:
        rows += tl.load(row_offset + sequence)
    return rows


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _forward_blocks(
    state, q, rows, k, v, until, hidden_from, hidden_until, blocks, first, last, S, qk_scale,
    STRIDE: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr,
    HIDDEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Takes the key blocks `blocks[first:last]` into the running softmax."""
    weighted, total, largest = state
    block = tl.load(blocks + first, mask=first < last, other=0)
    for step in range(first, last):
        start = block * BLOCK_K
        keys = _tile(k, start, S, STRIDE, BLOCK_K, H, WHOLE)
        values = _tile(v, start, S, STRIDE, BLOCK_K, H, WHOLE)
        block = tl.load(blocks + tl.minimum(step + 1, last - 1))
        scores = _product(q, tl.trans(keys))
        if WHOLE:
            new_largest = tl.maximum(largest, tl.max(scores, 1) * qk_scale)
            base = new_largest
            weights = tl.exp2(scores * qk_scale - base[:, None])
        else:
            end, gap_start, gap_end = _runs(
                until, hidden_from, hidden_until, start, S, BLOCK_K, HIDDEN
            )
            index = start + tl.arange(0, BLOCK_K)
            seen = _sees(
                rows[:, None], index[None, :], end[None, :], gap_start[None, :], gap_end[None, :],
                HIDDEN,
            )  # fmt: skip
            scores = tl.where(seen, scores * qk_scale, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            # rows that have seen nothing yet: any finite base gives weights 0
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(largest - base)
        total = total * rescale + tl.sum(weights, 1)
        weighted = weighted * rescale[:, None]
        weighted = tl.dot(weights.to(values.dtype), values, weighted, input_precision="ieee")
        largest = new_largest
    return weighted, total, largest


@triton.jit
def _forward_kernel(
    q, k, v, until, hidden_from, hidden_until, row_offset, full, needed, blocks, T, S, qk_scale,
    out, lse,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HIDDEN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    num_q, num_k = tl.cdiv(T, BLOCK_Q), tl.cdiv(S, BLOCK_K)
    sequence, key_head, block, head = _place(num_q, True, N // K, K)
    head += key_head * (N // K)
    start = block * BLOCK_Q
    q += sequence * T * N * H + head * H
    out += sequence * T * N * H + head * H
    k += sequence * S * K * H + key_head * H
    v += sequence * S * K * H + key_head * H
    until += sequence * S
    hidden_from += sequence * S
    hidden_until += sequence * S
    listed = sequence * num_q + block
    num_full, num_needed = tl.load(full + listed), tl.load(needed + listed)
    blocks += listed * num_k

    rows = _row_index(row_offset, sequence, start, BLOCK_Q, OFFSET)
    queries = _tile(q, start, T, N * H, BLOCK_Q, H, False)
    state = (
        tl.zeros([BLOCK_Q, H], tl.float32),
        tl.zeros([BLOCK_Q], tl.float32),
        tl.full([BLOCK_Q], float("-inf"), tl.float32),
    )
    state = _forward_blocks(
        state, queries, rows, k, v, until, hidden_from, hidden_until, blocks, 0, num_full, S,
        qk_scale, K * H, H, BLOCK_K, HIDDEN, True,
    )  # fmt: skip
    weighted, total, largest = _forward_blocks(
        state, queries, rows, k, v, until, hidden_from, hidden_until, blocks, num_full, num_needed,
        S, qk_scale, K * H, H, BLOCK_K, HIDDEN, False,
    )  # fmt: skip

    sees = total > 0
    total = tl.where(sees, total, 1.0)
    _store_tile(out, weighted / total[:, None], start, T, N * H, BLOCK_Q, H)
    lse += (sequence * N + head) * T
    place = start + tl.arange(0, BLOCK_Q)
    log_sum = tl.where(sees, largest + tl.log2(total), float("-inf"))
    tl.store(lse + place, log_sum, mask=place < T)


@triton.jit
def _dq_blocks(
    dq, q, d_out, lse, shift, rows, k, v, until, hidden_from, hidden_until, blocks, first, last, S,
    qk_scale,
    STRIDE: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr,
    HIDDEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    block = tl.load(blocks + first, mask=first < last, other=0)
    for step in range(first, last):
        start = block * BLOCK_K
        keys = _tile(k, start, S, STRIDE, BLOCK_K, H, WHOLE)
        values = _tile(v, start, S, STRIDE, BLOCK_K, H, WHOLE)
        block = tl.load(blocks + tl.minimum(step + 1, last - 1))
        weights = tl.exp2(_product(q, tl.trans(keys)) * qk_scale - lse[:, None])
        if not WHOLE:
            end, gap_start, gap_end = _runs(
                until, hidden_from, hidden_until, start, S, BLOCK_K, HIDDEN
            )
            index = start + tl.arange(0, BLOCK_K)
            seen = _sees(
                rows[:, None], index[None, :], end[None, :], gap_start[None, :], gap_end[None, :],
                HIDDEN,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        d_weights = _product(d_out, tl.trans(values))
        d_scores = weights * (d_weights + shift[:, None])
        dq = tl.dot(d_scores.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit
def _dq_kernel(
    q, k, v, d_out, lse, shift, until, hidden_from, hidden_until, row_offset, full, needed, blocks,
    T, S, qk_scale, scale, dq,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HIDDEN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    num_q, num_k = tl.cdiv(T, BLOCK_Q), tl.cdiv(S, BLOCK_K)
    sequence, key_head, block, head = _place(num_q, True, N // K, K)
    head += key_head * (N // K)
    start = block * BLOCK_Q
    q += sequence * T * N * H + head * H
    d_out += sequence * T * N * H + head * H
    dq += sequence * T * N * H + head * H
    k += sequence * S * K * H + key_head * H
    v += sequence * S * K * H + key_head * H
    until += sequence * S
    hidden_from += sequence * S
    hidden_until += sequence * S
    listed = sequence * num_q + block
    num_full, num_needed = tl.load(full + listed), tl.load(needed + listed)
    blocks += listed * num_k

    rows = _row_index(row_offset, sequence, start, BLOCK_Q, OFFSET)
    queries = _tile(q, start, T, N * H, BLOCK_Q, H, False)
    d_outs = _tile(d_out, start, T, N * H, BLOCK_Q, H, False)
    row_lse = _vector(lse + (sequence * N + head) * T, start, T, BLOCK_Q, False)
    row_shift = _vector(shift + (sequence * N + head) * T, start, T, BLOCK_Q, False)
    sums = tl.zeros([BLOCK_Q, H], tl.float32)
    sums = _dq_blocks(
        sums, queries, d_outs, row_lse, row_shift, rows, k, v, until, hidden_from, hidden_until,
        blocks, 0, num_full, S, qk_scale, K * H, H, BLOCK_K, HIDDEN, True,
    )  # fmt: skip
    sums = _dq_blocks(
        sums, queries, d_outs, row_lse, row_shift, rows, k, v, until, hidden_from, hidden_until,
        blocks, num_full, num_needed, S, qk_scale, K * H, H, BLOCK_K, HIDDEN, False,
    )  # fmt: skip
    _store_tile(dq, sums * scale, start, T, N * H, BLOCK_Q, H)


@triton.jit
def _dkdv_blocks(
    state, keys, values, index, runs, offset, q, d_out, lse, shift, blocks, first, last, T,
    qk_scale,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, H: tl.constexpr, BLOCK_Q: tl.constexpr,
    HIDDEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds what the query blocks `blocks[first:last]` of each head of the group contribute. One
    loop over both, so that the pipeline runs through; everything is [keys, queries]."""
    dk, dv = state
    end, gap_start, gap_end = runs
    block = tl.load(blocks + first, mask=first < last, other=0)
    for step in range(first * GROUP, last * GROUP):
        head = step % GROUP
        start = block * BLOCK_Q
        queries = _tile(q + head * H, start, T, STRIDE, BLOCK_Q, H, WHOLE)
        d_outs = _tile(d_out + head * H, start, T, STRIDE, BLOCK_Q, H, WHOLE)
        row_lse = _vector(lse + head.to(tl.int64) * T, start, T, BLOCK_Q, WHOLE)
        row_shift = _vector(shift + head.to(tl.int64) * T, start, T, BLOCK_Q, WHOLE)
        block = tl.load(blocks + tl.minimum((step + 1) // GROUP, last - 1))
        weights = tl.exp2(_product(keys, tl.trans(queries)) * qk_scale - row_lse[None, :])
        if not WHOLE:
            rows = offset + start + tl.arange(0, BLOCK_Q)
            seen = _sees(
                rows[None, :], index[:, None], end[:, None], gap_start[:, None], gap_end[:, None],
                HIDDEN,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        dv = tl.dot(weights.to(d_outs.dtype), d_outs, dv, input_precision="ieee")
        d_weights = _product(values, tl.trans(d_outs))
        d_scores = weights * (d_weights + row_shift[None, :])
        dk = tl.dot(d_scores.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _dkdv_kernel(
    q, k, v, d_out, lse, shift, until, hidden_from, hidden_until, row_offset, full, needed, blocks,
    T, S, qk_scale, scale, dk, dv,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HIDDEN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = N // K
    num_q, num_k = tl.cdiv(T, BLOCK_Q), tl.cdiv(S, BLOCK_K)
    sequence, key_head, block, _ = _place(num_k, False, 1, K)
    start = block * BLOCK_K
    first_head = key_head * GROUP
    q += sequence * T * N * H + first_head * H
    d_out += sequence * T * N * H + first_head * H
    lse += (sequence * N + first_head) * T
    shift += (sequence * N + first_head) * T
    place = sequence * S * K * H + key_head * H
    listed = sequence * num_k + block
    num_full, num_needed = tl.load(full + listed), tl.load(needed + listed)
    blocks += listed * num_q

    offset = 0
    if OFFSET:
        offset = tl.load(row_offset + sequence)
    index = start + tl.arange(0, BLOCK_K)
    keys = _tile(k + place, start, S, K * H, BLOCK_K, H, False)
    values = _tile(v + place, start, S, K * H, BLOCK_K, H, False)
    runs = _runs(
        until + sequence * S, hidden_from + sequence * S, hidden_until + sequence * S, start, S,
        BLOCK_K, HIDDEN,
    )  # fmt: skip
    state = tl.zeros([BLOCK_K, H], tl.float32), tl.zeros([BLOCK_K, H], tl.float32)
    state = _dkdv_blocks(
        state, keys, values, index, runs, offset, q, d_out, lse, shift, blocks, 0, num_full, T,
        qk_scale, GROUP, N * H, H, BLOCK_Q, HIDDEN, True,
    )  # fmt: skip
    sum_k, sum_v = _dkdv_blocks(
        state, keys, values, index, runs, offset, q, d_out, lse, shift, blocks, num_full,
        num_needed, T, qk_scale, GROUP, N * H, H, BLOCK_Q, HIDDEN, False,
    )  # fmt: skip
    _store_tile(dk + place, sum_k * scale, start, S, K * H, BLOCK_K, H)
    _store_tile(dv + place, sum_v, start, S, K * H, BLOCK_K, H)


def forward(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    vectors: tuple[
        jax.Array | None, ...
    ],  # until, hidden_from, hidden_until [B, S], row_offset [B]
    lists: tuple[jax.Array, ...],  # full [B, nq], needed [B, nq], blocks [B, nq, nk]; int32
    scale: float,
    config: Config,
    capability: int,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] in q's type and log-sum-exp in base 2, [B, N, T] float32.

    `lists`: for each query block its key blocks, the fully visible first; how many those are, and
    how many there are in all. `vectors` may hold None for hidden_from with hidden_until, and for
    row_offset. `scale` must not be negative.
    """
    B, T, N, _ = q.shape
    shapes = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    )
    scalars = (np.float32(scale * LOG2_E),)
    programs = B * N * -(-T // config.block_q)
    return _launch(
        _forward_kernel, (q, k, v), vectors, lists, scalars, shapes, programs, config, capability
    )


def backward_q(q, k, v, d_out, lse, shift, vectors, lists, scale, config, capability) -> jax.Array:
    """dq, from `lse` and `shift` [B, N, T] float32: the forward's log-sum-exp, and d lse - sum(out
    * d out) of each row. Other arguments as in `forward`."""
    B, T, N, _ = q.shape
    arrays = (q, k, v, d_out, lse, shift)
    shapes = (jax.ShapeDtypeStruct(q.shape, q.dtype),)
    scalars = (np.float32(scale * LOG2_E), np.float32(scale))
    programs = B * N * -(-T // config.block_q)
    return _launch(
        _dq_kernel, arrays, vectors, lists, scalars, shapes, programs, config, capability
    )[0]


def backward_kv(
    q, k, v, d_out, lse, shift, vectors, lists, scale, config, capability
) -> tuple[jax.Array, jax.Array]:
    """dk and dv. As `backward_q`, but `lists` are those of each key block over query blocks."""
    B, S, K, _ = k.shape
    arrays = (q, k, v, d_out, lse, shift)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v))
    scalars = (np.float32(scale * LOG2_E), np.float32(scale))
    programs = B * K * -(-S // config.block_k)
    return _launch(
        _dkdv_kernel, arrays, vectors, lists, scalars, shapes, programs, config, capability
    )


def _launch(kernel, arrays, vectors, lists, scalars, shapes, programs, config, capability):
    q, k = arrays[:2]
    until, hidden_from, _, row_offset = vectors
    # a pointer that the kernel does not follow stands for a vector that is not given
    pointers = [until if vector is None else vector for vector in vectors]
    return triton_call.triton_call(
        kernel,
        *arrays,
        *pointers,
        *lists,
        q.shape[1],
        k.shape[1],
        *scalars,
        out_shape=shapes,
        grid=(programs,),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        capability=capability,
        name=f"masked_attention{kernel.__name__}",
        N=q.shape[2],
        K=k.shape[2],
        H=q.shape[3],
        BLOCK_Q=config.block_q,
        BLOCK_K=config.block_k,
        HIDDEN=hidden_from is not None,
        OFFSET=row_offset is not None,
    )
