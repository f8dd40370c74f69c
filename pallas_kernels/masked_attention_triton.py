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

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels import triton_call
from pallas_kernels.masked_attention_triton_config import Config

LOG2_E = 1.4426950408889634

# until, hidden_from, hidden_until [B, S] and row_offset [B], int32; the last three may be None,
# hidden_from only with hidden_until
Vectors = tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]

# Vectors over rows and keys are padded to a multiple of this, at least as long as any block: they
# are then aligned, and loaded without bounds.
PAD = tl.constexpr(256)


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
    """Rows start .. start + BLOCK of an array of `length` rows of H entries. The last row stands
    for those beyond: nothing sees or is seen by them, and no bound has to be kept."""
    row = tl.arange(0, BLOCK)
    if not WHOLE:
        row = tl.minimum(row, length - 1 - start)
    place = row[:, None] * stride + tl.arange(0, H)[None, :]
    return tl.load(pointer + start.to(tl.int64) * stride + place)


@triton.jit
def _store_tile(pointer, values, start, length, stride, BLOCK: tl.constexpr, H: tl.constexpr):
    inside = tl.arange(0, BLOCK)
    place = inside[:, None] * stride + tl.arange(0, H)[None, :]
    pointer += start.to(tl.int64) * stride
    values = values.to(pointer.dtype.element_ty)
    tl.store(pointer + place, values, mask=(start + inside < length)[:, None])


@triton.jit
def _runs(spans, gap_starts, gap_spans, start, BLOCK: tl.constexpr, HIDDEN: tl.constexpr):
    """What `_sees` needs of a block of keys."""
    place = start + tl.arange(0, BLOCK)
    span = tl.load(spans + place)
    if HIDDEN:
        return place, span, tl.load(gap_starts + place), tl.load(gap_spans + place)
    return place, span, span, span


@triton.jit
def _sees(rows, keys, span, gap_start, gap_span, HIDDEN: tl.constexpr):
    """Whether start <= row < start + span, as one unsigned comparison for each run of rows."""
    seen = (rows - keys).to(tl.uint32, bitcast=True) < span.to(tl.uint32, bitcast=True)
    if HIDDEN:
        since = (rows - gap_start).to(tl.uint32, bitcast=True)
        seen = seen & (since >= gap_span.to(tl.uint32, bitcast=True))
    return seen


@triton.jit
def _row_index(row_offset, start, BLOCK: tl.constexpr, OFFSET: tl.constexpr):
    rows = start + tl.arange(0, BLOCK)
    if OFFSET:
        rows += tl.load(row_offset)
    return rows


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _forward_blocks(
    state, q, rows, k, v, spans, gap_starts, gap_spans, blocks, first, last, S, qk_scale,
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
            index, span, gap_start, gap_span = _runs(
                spans, gap_starts, gap_spans, start, BLOCK_K, HIDDEN
            )
            seen = _sees(
                rows[:, None], index[None, :], span[None, :], gap_start[None, :],
                gap_span[None, :], HIDDEN,
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
    q, k, v, spans, gap_starts, gap_spans, row_offset, counts, blocks, T, S, qk_scale,
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
    padded_keys = tl.cdiv(S, PAD) * PAD
    spans += sequence * padded_keys
    gap_starts += sequence * padded_keys
    gap_spans += sequence * padded_keys
    listed = sequence * num_q + block
    num_full, num_needed = tl.load(counts + 2 * listed), tl.load(counts + 2 * listed + 1)
    blocks += listed * num_k

    rows = _row_index(row_offset + sequence, start, BLOCK_Q, OFFSET)
    queries = _tile(q, start, T, N * H, BLOCK_Q, H, False)
    state = (
        tl.zeros([BLOCK_Q, H], tl.float32),
        tl.zeros([BLOCK_Q], tl.float32),
        tl.full([BLOCK_Q], float("-inf"), tl.float32),
    )
    state = _forward_blocks(
        state, queries, rows, k, v, spans, gap_starts, gap_spans, blocks, 0, num_full, S,
        qk_scale, K * H, H, BLOCK_K, HIDDEN, True,
    )  # fmt: skip
    weighted, total, largest = _forward_blocks(
        state, queries, rows, k, v, spans, gap_starts, gap_spans, blocks, num_full, num_needed,
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
    dq, q, d_out, lse, shift, rows, k, v, spans, gap_starts, gap_spans, blocks, first, last, S,
    qk_scale,
    STRIDE: tl.constexpr, H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
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
            index, span, gap_start, gap_span = _runs(
                spans, gap_starts, gap_spans, start, BLOCK_K, HIDDEN
            )
            seen = _sees(
                rows[:, None], index[None, :], span[None, :], gap_start[None, :],
                gap_span[None, :], HIDDEN,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        d_weights = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32) + shift[:, None]
        d_weights = tl.dot(d_out, tl.trans(values), d_weights, input_precision="ieee")
        d_scores = weights * d_weights
        dq = tl.dot(d_scores.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit
def _dq_kernel(
    q, k, v, d_out, lse, shift, spans, gap_starts, gap_spans, row_offset, counts, blocks,
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
    padded_keys = tl.cdiv(S, PAD) * PAD
    spans += sequence * padded_keys
    gap_starts += sequence * padded_keys
    gap_spans += sequence * padded_keys
    listed = sequence * num_q + block
    num_full, num_needed = tl.load(counts + 2 * listed), tl.load(counts + 2 * listed + 1)
    blocks += listed * num_k

    rows = _row_index(row_offset + sequence, start, BLOCK_Q, OFFSET)
    queries = _tile(q, start, T, N * H, BLOCK_Q, H, False)
    d_outs = _tile(d_out, start, T, N * H, BLOCK_Q, H, False)
    place = (sequence * N + head) * (tl.cdiv(T, PAD) * PAD) + start + tl.arange(0, BLOCK_Q)
    row_lse, row_shift = tl.load(lse + place), tl.load(shift + place)
    sums = tl.zeros([BLOCK_Q, H], tl.float32)
    sums = _dq_blocks(
        sums, queries, d_outs, row_lse, row_shift, rows, k, v, spans, gap_starts, gap_spans,
        blocks, 0, num_full, S, qk_scale, K * H, H, BLOCK_Q, BLOCK_K, HIDDEN, True,
    )  # fmt: skip
    sums = _dq_blocks(
        sums, queries, d_outs, row_lse, row_shift, rows, k, v, spans, gap_starts, gap_spans,
        blocks, num_full, num_needed, S, qk_scale, K * H, H, BLOCK_Q, BLOCK_K, HIDDEN, False,
    )  # fmt: skip
    _store_tile(dq, sums * scale, start, T, N * H, BLOCK_Q, H)


@triton.jit
def _dkdv_blocks(
    state, keys, values, start_k, q, d_out, lse, shift, spans, gap_starts, gap_spans,
    row_offset, blocks, first, last, T, qk_scale,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, H: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, HIDDEN: tl.constexpr, OFFSET: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds what the query blocks `blocks[first:last]` of each head of the group contribute. One
    loop over both, so that the pipeline runs through; everything is [keys, queries]."""
    dk, dv = state
    padded_rows = tl.cdiv(T, PAD) * PAD
    if not WHOLE:
        index, span, gap_start, gap_span = _runs(
            spans, gap_starts, gap_spans, start_k, BLOCK_K, HIDDEN
        )
    block = tl.load(blocks + first, mask=first < last, other=0)
    for step in range(first * GROUP, last * GROUP):
        head = step % GROUP
        start = block * BLOCK_Q
        queries = _tile(q + head * H, start, T, STRIDE, BLOCK_Q, H, WHOLE)
        d_outs = _tile(d_out + head * H, start, T, STRIDE, BLOCK_Q, H, WHOLE)
        place = head * padded_rows + start
        row_lse = tl.load(lse + place + tl.arange(0, BLOCK_Q))
        row_shift = tl.load(shift + place + tl.arange(0, BLOCK_Q))
        block = tl.load(blocks + tl.minimum((step + 1) // GROUP, last - 1))
        weights = tl.exp2(_product(keys, tl.trans(queries)) * qk_scale - row_lse[None, :])
        if not WHOLE:
            rows = _row_index(row_offset, start, BLOCK_Q, OFFSET)
            seen = _sees(
                rows[None, :], index[:, None], span[:, None], gap_start[:, None],
                gap_span[:, None], HIDDEN,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        dv = tl.dot(weights.to(d_outs.dtype), d_outs, dv, input_precision="ieee")
        d_weights = _product(values, tl.trans(d_outs))
        d_scores = weights * (d_weights + row_shift[None, :])
        dk = tl.dot(d_scores.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _dkdv_kernel(
    q, k, v, d_out, lse, shift, spans, gap_starts, gap_spans, row_offset, counts, blocks,
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
    padded_rows = tl.cdiv(T, PAD) * PAD
    lse += (sequence * N + first_head) * padded_rows
    shift += (sequence * N + first_head) * padded_rows
    place = sequence * S * K * H + key_head * H
    padded_keys = tl.cdiv(S, PAD) * PAD
    spans += sequence * padded_keys
    gap_starts += sequence * padded_keys
    gap_spans += sequence * padded_keys
    row_offset += sequence
    listed = sequence * num_k + block
    num_full, num_needed = tl.load(counts + 2 * listed), tl.load(counts + 2 * listed + 1)
    blocks += listed * num_q

    keys = _tile(k + place, start, S, K * H, BLOCK_K, H, False)
    values = _tile(v + place, start, S, K * H, BLOCK_K, H, False)
    state = tl.zeros([BLOCK_K, H], tl.float32), tl.zeros([BLOCK_K, H], tl.float32)
    state = _dkdv_blocks(
        state, keys, values, start, q, d_out, lse, shift, spans, gap_starts, gap_spans,
        row_offset, blocks, 0, num_full, T, qk_scale, GROUP, N * H, H, BLOCK_Q, BLOCK_K, HIDDEN,
        OFFSET, True,
    )  # fmt: skip
    sum_k, sum_v = _dkdv_blocks(
        state, keys, values, start, q, d_out, lse, shift, spans, gap_starts, gap_spans,
        row_offset, blocks, num_full, num_needed, T, qk_scale, GROUP, N * H, H, BLOCK_Q, BLOCK_K,
        HIDDEN, OFFSET, False,
    )  # fmt: skip
    _store_tile(dk + place, sum_k * scale, start, S, K * H, BLOCK_K, H)
    _store_tile(dv + place, sum_v, start, S, K * H, BLOCK_K, H)


def forward(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    vectors: Vectors,
    lists: tuple[jax.Array, ...],  # counts [B, nq, 2], blocks [B, nq, nk]; int32
    scale: float,
    config: Config,
    capability: int,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] in q's type and log-sum-exp in base 2, [B, N, T] float32.

    `lists`: for each query block its key blocks, the fully visible first; how many those are, and
    how many there are in all. `scale` must not be negative.
    """
    B, T, N, _ = q.shape
    shapes = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    )
    scalars = (np.float32(scale * LOG2_E),)
    programs = B * N * -(-T // config.block_q)
    launch = _Launch(vectors, lists, scalars, config, capability)
    return launch(_forward_kernel, (q, k, v), shapes, programs)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,  # [B, T, N, H]
    lse: jax.Array,  # [B, N, T] float32, as `forward` returned it
    shift: jax.Array,  # [B, N, T] float32: d lse - sum(out * d out) of each row
    vectors: Vectors,
    row_lists: tuple[jax.Array, ...],  # as in `forward`, for the blocks of `config_q`
    key_lists: tuple[jax.Array, ...],  # of each key block over query blocks, for `config_kv`
    scale: float,
    config_q: Config,
    config_kv: Config,
    capability: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv, in the types of q, k and v."""
    B, T, N, _ = q.shape
    S, K = k.shape[1:3]
    # exp(score - inf) is 0: rows that see nothing, and those that fill up the last block
    lse = _padded(jnp.where(lse == -jnp.inf, jnp.inf, lse), jnp.inf)
    arrays = (q, k, v, d_out, lse, _padded(shift, 0.0))
    shape_q, shape_k, shape_v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
    scalars = (np.float32(scale * LOG2_E), np.float32(scale))
    launch = _Launch(vectors, row_lists, scalars, config_q, capability)
    (dq,) = launch(_dq_kernel, arrays, (shape_q,), B * N * -(-T // config_q.block_q))
    launch = _Launch(vectors, key_lists, scalars, config_kv, capability)
    dk, dv = launch(_dkdv_kernel, arrays, (shape_k, shape_v), B * K * -(-S // config_kv.block_k))
    return dq, dk, dv


def _padded(x: jax.Array, value: float | int) -> jax.Array:
    tail = -x.shape[-1] % PAD.value
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, tail),), constant_values=value)


class _Launch(NamedTuple):
    vectors: Vectors
    lists: tuple[jax.Array, ...]
    scalars: tuple[np.float32, ...]
    config: Config
    capability: int

    def __call__(self, kernel, arrays, shapes, programs) -> tuple[jax.Array, ...]:
        q, k = arrays[:2]
        until, hidden_from, hidden_until, row_offset = self.vectors
        key = jax.lax.broadcasted_iota(jnp.int32, until.shape, 1)
        spans = _padded(jnp.maximum(until - key, 0), 0)
        # a pointer that the kernel does not follow stands for a vector that is not given
        gap_starts = gap_spans = spans
        if hidden_from is not None:
            gap_starts = _padded(hidden_from, 0)
            gap_spans = _padded(jnp.maximum(hidden_until - hidden_from, 0), 0)
        return triton_call.triton_call(
            kernel,
            *arrays,
            spans,
            gap_starts,
            gap_spans,
            spans if row_offset is None else row_offset,
            *self.lists,
            q.shape[1],
            k.shape[1],
            *self.scalars,
            out_shape=shapes,
            grid=(programs,),
            num_warps=self.config.num_warps,
            num_stages=self.config.num_stages,
            capability=self.capability,
            name=f"masked_attention{kernel.__name__}",
            N=q.shape[2],
            K=k.shape[2],
            H=q.shape[3],
            BLOCK_Q=self.config.block_q,
            BLOCK_K=self.config.block_k,
            HIDDEN=hidden_from is not None,
            OFFSET=row_offset is not None,
        )
