# SPDX-License-Identifier: Apache-2.0
"""Blocked attention in plain XLA: memory grows with T + S, and blocks that nobody needs are never
computed.

Queries and keys are cut into blocks; the G query heads that share a key and value head are laid out
as further rows of a query block, so keys and values are never repeated. For each query block a loop
with a run-time trip count walks the compacted list of the key blocks that some row of the batch
sees. The backward pass recomputes the weights from the saved log-sum-exp, walks the transposed
lists and adds to dq in place, five products in all.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ops import _online_softmax as online_softmax
from ops import _saved, dispatch
from ops import block_table as block_tables
from ops._varying import common_varying, varying_like
from ops.visibility import Visibility, visible

_SCORE_BYTES = {"cpu": 8 << 20, "gpu": 128 << 20, "tpu": 32 << 20}
_LARGEST_BLOCK = {"cpu": 256, "gpu": 1024, "tpu": 512}
_SMALLEST_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    q: int
    k: int


class _Rows(NamedTuple):
    """One query block."""

    q: jax.Array  # [B, K, G * block_q, H]
    index: jax.Array  # [B, block_q] int32


class _Keys(NamedTuple):
    """One key block."""

    k: jax.Array  # [B, K, block_k, H]
    v: jax.Array  # [B, K, block_k, H]
    index: jax.Array  # [block_k] int32
    visibility: Visibility  # [B, block_k] vectors


def masked_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    visibility: Visibility,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, H], [B, T, N]
    blocks = block_sizes(q.shape[0] * q.shape[2], q.shape[1], k.shape[1])
    q, k, v, visibility = common_varying((q, k, v, visibility))
    return _attend(q, k, v, visibility, scale, blocks)


def block_sizes(heads: int, num_rows: int, num_keys: int) -> BlockSizes:
    """Blocks that keep the float32 scores of `heads` (B * N) pairs of blocks within the platform's
    budget."""
    platform = dispatch.current_platform()
    budget = _SCORE_BYTES.get(platform, _SCORE_BYTES["cpu"]) // (4 * heads)
    block_q = block_k = _LARGEST_BLOCK.get(platform, _LARGEST_BLOCK["cpu"])
    while block_q * block_k > budget and block_k > _SMALLEST_BLOCK:
        block_q, block_k = (
            (block_q // 2, block_k) if block_q == block_k else (block_q, block_k // 2)
        )
    return BlockSizes(_even(num_rows, block_q), _even(num_keys, block_k))


def _even(length: int, block: int) -> int:
    """The block that cuts `length` into as few blocks as `block` does, but of nearly equal size."""
    number = -(-length // block)
    even = -(-length // number)
    return even if number == 1 else -(-even // 16) * 16


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, visibility, scale, blocks):
    return _forward(q, k, v, visibility, scale, blocks)


def _attend_fwd(q, k, v, visibility, scale, blocks):
    out, lse = _saved.attention(*_forward(q, k, v, visibility, scale, blocks))
    return (out, lse), (q, k, v, visibility, out, lse)


def _attend_bwd(scale, blocks, saved, cotangents):
    return (*_backward(*saved, *cotangents, scale, blocks), None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(q, k, v, visibility, scale, blocks):
    rows, keys = (
        _row_blocks(q, k.shape[2], visibility, blocks),
        _key_blocks(k, v, visibility, blocks),
    )
    table = block_tables.merge_batch(visibility.block_table(q.shape[1], blocks.q, blocks.k))
    needed = block_tables.key_blocks(table)

    def query_block(_, xs):
        row, count, indices = xs
        empty = varying_like(online_softmax.start(row.q.shape[:3], q.shape[3]), row.q)

        def key_block(step, state):
            key = _take(keys, indices[step])
            return online_softmax.add(state, _scores(row, key, scale), key.v)

        return None, online_softmax.finish(jax.lax.fori_loop(0, count, key_block, empty))

    _, (out, lse) = jax.lax.scan(query_block, None, (rows, needed.counts, needed.indices))
    return _from_rows(out, q).astype(q.dtype), _from_rows(lse[..., None], q)[..., 0]


def _backward(q, k, v, visibility, out, lse, d_out, d_lse, scale, blocks):
    K = k.shape[2]
    rows, keys = _row_blocks(q, K, visibility, blocks), _key_blocks(k, v, visibility, blocks)
    table = block_tables.merge_batch(visibility.block_table(q.shape[1], blocks.q, blocks.k))
    needed = block_tables.query_blocks(table)
    # d score = weight * (d weight - sum over keys of weight * d weight + d lse); rows that see
    # nothing have none.
    blind = lse == -jnp.inf
    shift = d_lse - jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    shift = _to_rows(jnp.where(blind, 0.0, shift)[..., None], K, blocks)[..., 0]
    lse = _to_rows(jnp.where(blind, 0.0, lse)[..., None], K, blocks)[..., 0]
    row_blocks = (rows, _to_rows(d_out, K, blocks), lse, shift)

    def key_block(dq, xs):
        key, count, indices = xs
        nothing = varying_like(jnp.zeros(key.k.shape, jnp.float32), key.k)

        def query_block(step, state):
            dq, dk, dv = state
            row, d_out, lse, shift = _take(row_blocks, indices[step])
            weights = jnp.exp(_scores(row, key, scale) - lse[..., None])
            dv += _product("BKTS,BKTH->BKSH", weights.astype(d_out.dtype), d_out)
            d_weights = _product("BKTH,BKSH->BKTS", d_out, key.v)
            d_scores = (scale * weights * (d_weights + shift[..., None])).astype(q.dtype)
            dk += _product("BKTS,BKTH->BKSH", d_scores, row.q)
            dq = dq.at[indices[step]].add(_product("BKTS,BKSH->BKTH", d_scores, key.k))
            return dq, dk, dv

        dq, dk, dv = jax.lax.fori_loop(0, count, query_block, (dq, nothing, nothing))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq = varying_like(jnp.zeros(rows.q.shape, jnp.float32), q)
    dq, (dk, dv) = jax.lax.scan(key_block, dq, (keys, needed.counts, needed.indices))
    return _from_rows(dq, q).astype(q.dtype), _from_keys(dk, k), _from_keys(dv, v)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _scores(row: _Rows, key: _Keys, scale: float) -> jax.Array:
    """[B, K, G * block_q, block_k] float32, -inf where invisible."""
    scores = scale * _product("BKTH,BKSH->BKTS", row.q, key.k)
    mask = visible(key.visibility, row.index, key.index)[:, None, None]
    B, K, _, block_k = scores.shape
    grouped = scores.reshape(B, K, -1, row.index.shape[1], block_k)
    return jnp.where(mask, grouped, -jnp.inf).reshape(scores.shape)


def _take(blocks, index):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), blocks)


def _row_blocks(q: jax.Array, K: int, visibility: Visibility, blocks: BlockSizes) -> _Rows:
    padded = q.shape[1] + -q.shape[1] % blocks.q
    index = visibility.rows(padded).reshape(q.shape[0], -1, blocks.q)
    return _Rows(_to_rows(q, K, blocks), jnp.moveaxis(index, 1, 0))


def _key_blocks(k: jax.Array, v: jax.Array, visibility: Visibility, blocks: BlockSizes) -> _Keys:
    """Keys that fill up the last block have `until` 0, so nobody sees them."""

    def vectors(vector):
        return jnp.moveaxis(_pad(vector, blocks.k).reshape(k.shape[0], -1, blocks.k), 1, 0)

    without_offset = dataclasses.replace(visibility, row_offset=None)
    count = -(-k.shape[1] // blocks.k)
    index = jnp.arange(count * blocks.k, dtype=jnp.int32).reshape(count, blocks.k)
    return _Keys(
        _to_keys(k, blocks), _to_keys(v, blocks), index, jax.tree.map(vectors, without_offset)
    )


def _pad(x: jax.Array, block: int) -> jax.Array:
    tail = -x.shape[1] % block
    return jnp.pad(x, ((0, 0), (0, tail)) + ((0, 0),) * (x.ndim - 2)) if tail else x


def _to_rows(x: jax.Array, K: int, blocks: BlockSizes) -> jax.Array:
    """[B, T, N, X] -> [nq, B, K, G * block_q, X]"""
    x = _pad(x, blocks.q)
    B, T, N, X = x.shape
    x = x.reshape(B, T // blocks.q, blocks.q, K, N // K, X)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(-1, B, K, N // K * blocks.q, X)


def _from_rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """[nq, B, K, G * block_q, X] -> [B, T, N, X]"""
    B, T, N, _ = like.shape
    nq, _, K, rows, X = x.shape
    x = x.reshape(nq, B, K, N // K, rows * K // N, X).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, -1, N, X)[:, :T]


def _to_keys(x: jax.Array, blocks: BlockSizes) -> jax.Array:
    """[B, S, K, H] -> [nk, B, K, block_k, H]"""
    x = _pad(x, blocks.k)
    B, S, K, H = x.shape
    return x.reshape(B, S // blocks.k, blocks.k, K, H).transpose(1, 0, 3, 2, 4)


def _from_keys(x: jax.Array, like: jax.Array) -> jax.Array:
    """[nk, B, K, block_k, H] -> [B, S, K, H]"""
    B, S, K, H = like.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(B, -1, K, H)[:, :S]
