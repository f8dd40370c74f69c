# SPDX-License-Identifier: Apache-2.0
"""masked_attention on Hopper, in Pallas Mosaic GPU: what is served, lists of blocks, and the
gradient."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ops import block_table as block_tables
from ops import dispatch
from ops._varying import common_varying, varying_like
from ops.visibility import Visibility
from pallas_kernels import masked_attention_mosaic as forward_kernel
from pallas_kernels import masked_attention_mosaic_backward as backward_kernels
from pallas_kernels import masked_attention_mosaic_config as configs
from pallas_kernels import mosaic, triton_call
from pallas_kernels.mosaic import COMPUTE, UNIT

_DTYPES = ("bfloat16", "float16")


class _Tiles(NamedTuple):
    """Which blocks each tile of queries or keys needs."""

    order: jax.Array  # [B, tiles] int32
    counts: jax.Array  # [B, tiles, 2] int32: full ones, needed ones
    blocks: jax.Array  # [B, tiles, blocks'] int32: full ones first, then the other needed ones


def masked_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    visibility: Visibility,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, H], [B, T, N]
    _check(q, k, v)
    plan = configs.plan(q.shape[3])
    if scale <= 0:  # the kernel takes the largest score before it scales it
        q, scale = (-q, -scale) if scale else (0 * q, 1.0)
    q, k, v, visibility = common_varying((q, k, v, visibility))
    T = q.shape[1]
    out, lse = _attend(*(_whole_copies(x) for x in (q, k, v)), visibility, scale, plan)
    return out[:, :T], lse[:, :T]


def _check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    platform = dispatch.current_platform()
    if platform != "gpu":
        raise dispatch.Unsupported(f"mosaic_gpu: runs on Hopper GPUs (here: {platform})")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in _DTYPES:
        raise dispatch.Unsupported(
            f"mosaic_gpu: q, k and v of types {q.dtype}, {k.dtype} and {v.dtype}; one of "
            f"{' and '.join(_DTYPES)} for all three is served"
        )
    if q.shape[3] not in configs.HEAD_DIMS:
        raise dispatch.Unsupported(f"mosaic_gpu: head dim {q.shape[3]}; 64, 128 and 256 are served")
    try:
        capability = triton_call.capability()
    except triton_call.Missing as missing:
        raise dispatch.Unsupported(f"mosaic_gpu: {missing}") from None
    if capability != 90:
        raise dispatch.Unsupported(f"mosaic_gpu: compute capability {capability}; 90 is served")


def _whole_copies(x: jax.Array) -> jax.Array:
    """TMA copies whole groups of 8 rows: other lengths are padded, keys that nobody sees among
    them."""
    tail = -x.shape[1] % 8
    return jnp.pad(x, ((0, 0), (0, tail), (0, 0), (0, 0))) if tail else x


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, visibility, scale, plan):
    return _attend_fwd(q, k, v, visibility, scale, plan)[0]


def _attend_fwd(q, k, v, visibility, scale, plan):
    tiles = _query_tiles(visibility, q, k, plan.forward.units)
    arrays = (q, k, v, _vectors(visibility), _row_offset(visibility), *tiles)
    out, lse = forward_kernel.forward(*arrays, scale=scale, config=plan.forward)
    out, lse = varying_like((out, lse), q)
    return (out, lse[..., : q.shape[1]].transpose(0, 2, 1)), (q, k, v, visibility, out, lse)


def _attend_bwd(scale, plan, saved, cotangents):
    q, k, v, visibility, out, lse = saved
    d_out, d_lse = cotangents
    # d score = weight * (d weight - sum over keys of weight * d weight + d lse)
    shift = d_lse - jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    shift = jnp.pad(shift.transpose(0, 2, 1), ((0, 0), (0, 0), (0, lse.shape[2] - q.shape[1])))
    blind = lse == -jnp.inf  # a weight exp2(score - inf) is 0, and so is its shift
    shift = jnp.where(blind, 0.0, shift)
    lse = jnp.where(blind, jnp.inf, lse * forward_kernel.LOG2E)
    arrays = (q, k, v, d_out, lse, shift, _vectors(visibility), _row_offset(visibility))
    queries = _query_tiles(visibility, q, k, plan.dq.units)
    dq = backward_kernels.dq(*arrays, *queries, scale=scale, config=plan.dq)
    keys = _key_tiles(visibility, q)
    gradients = {}
    for wanted in plan.dk_dv_calls:
        results = backward_kernels.dk_dv(
            *arrays, *keys, scale=scale, config=plan.dk_dv, wanted=wanted
        )
        gradients |= dict(zip(wanted, results, strict=True))
    return (*varying_like((dq, gradients["dk"], gradients["dv"]), q), None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _row_offset(visibility: Visibility) -> jax.Array:
    if visibility.row_offset is None:
        return jnp.zeros((visibility.batch,), jnp.int32)
    return visibility.row_offset


def _vectors(visibility: Visibility) -> jax.Array:
    """[B, 1 or 3, S'] int32: span, hidden_from and length of the hidden run.

    Padded by at least one block that nobody sees, up to whole tiles of keys.
    """
    keys = jnp.arange(visibility.num_keys, dtype=jnp.int32)[None]
    vectors = [jnp.maximum(jnp.maximum(visibility.until, 0) - keys, 0)]
    if visibility.hidden_from is not None:
        start = jnp.maximum(visibility.hidden_from, 0)
        length = jnp.maximum(jnp.maximum(visibility.hidden_until, 0) - start, 0)
        vectors += [start, length]
    tile = COMPUTE * UNIT
    tail = tile - visibility.num_keys % tile
    tail += UNIT if tail < UNIT else 0
    return jnp.pad(jnp.stack(vectors, axis=1), ((0, 0), (0, 0), (0, tail)))


def _query_tiles(visibility: Visibility, q: jax.Array, k: jax.Array, units: int) -> _Tiles:
    """For each tile of queries the blocks of 64 keys; a step's missing ones are beyond the last."""
    rows = mosaic.tile_rows(q.shape[2] // k.shape[2])
    table = visibility.block_table(q.shape[1], rows, UNIT)
    rank = block_tables.FULL - table.astype(jnp.int32)
    return _tiles(rank, jax.lax.broadcasted_iota(jnp.int32, table.shape, 2), units - 1)


def _key_tiles(visibility: Visibility, q: jax.Array) -> _Tiles:
    """For each tile of keys the blocks of 64 rows, with the kinds of its halves in the low bits."""
    table = visibility.block_table(q.shape[1], UNIT, UNIT).astype(jnp.int32)
    table = jnp.pad(table, ((0, 0), (0, 0), (0, table.shape[2] % COMPUTE)))
    kinds = table.reshape(*table.shape[:2], -1, COMPUTE).transpose(0, 2, 1, 3)
    full = jnp.all(kinds == block_tables.FULL, axis=-1)
    needed = jnp.any(kinds != block_tables.EMPTY, axis=-1)
    rank = jnp.where(full, 0, jnp.where(needed, 1, 2))
    entry = jax.lax.broadcasted_iota(jnp.int32, rank.shape, 2) << (
        COMPUTE * backward_kernels.KIND_BITS
    )
    for half in range(COMPUTE):
        entry |= kinds[..., half] << (half * backward_kernels.KIND_BITS)
    return _tiles(rank, entry, 0)


def _tiles(rank: jax.Array, entry: jax.Array, spare: int) -> _Tiles:
    """Lists of the entries [B, tiles, blocks] of rank 0 (full), then 1 (needed); `spare` places
    more, and those left over, name the block after the last."""
    full = jnp.sum(rank == 0, axis=-1, dtype=jnp.int32)
    needed = jnp.sum(rank < 2, axis=-1, dtype=jnp.int32)
    blocks = rank.shape[-1]
    place = jax.lax.broadcasted_iota(jnp.int32, rank.shape, 2)
    # rank and place in one operand: the sort is over unique keys and needs no stability
    _, lists = jax.lax.sort((rank * blocks + place, entry), num_keys=1, is_stable=False)
    lists = jnp.where(place < needed[..., None], lists, blocks)
    lists = jnp.pad(lists, ((0, 0), (0, 0), (0, spare)), constant_values=blocks)
    order = jnp.argsort(-needed, axis=-1).astype(jnp.int32)
    return _Tiles(order, jnp.stack((full, needed), axis=-1), lists)
