# SPDX-License-Identifier: Apache-2.0
"""masked_attention on Hopper, in Pallas Mosaic GPU: what is served, lists of blocks, and the
gradient."""

from functools import partial

import jax
import jax.numpy as jnp

from ops import _block_lists, _saved, dispatch
from ops._varying import common_varying, varying_like
from ops.visibility import Visibility
from pallas_kernels import masked_attention_mosaic as forward_kernel
from pallas_kernels import masked_attention_mosaic_backward as backward_kernels
from pallas_kernels import masked_attention_mosaic_config as configs
from pallas_kernels import mosaic, triton_call
from pallas_kernels.mosaic import COMPUTE, UNIT

_DTYPES = ("bfloat16", "float16")


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
    out, lse = _saved.attention(*varying_like((out, lse), q))
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
    splits = _splits(q, k)
    for wanted in plan.dk_dv_calls:
        results = backward_kernels.dk_dv(
            *arrays, *keys, scale=scale, config=plan.dk_dv, wanted=wanted, splits=splits
        )
        gradients |= dict(zip(wanted, results, strict=True))
    if splits > 1:
        gradients = {
            name: jnp.sum(parts, axis=0)[:, : k.shape[1]].astype(k.dtype)
            for name, parts in gradients.items()
        }
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


def _query_tiles(
    visibility: Visibility, q: jax.Array, k: jax.Array, units: int
) -> tuple[jax.Array, jax.Array]:
    """For each tile of queries the blocks of 64 keys, and one beyond the last to fill up a step."""
    rows = mosaic.tile_rows(q.shape[2] // k.shape[2])
    return _block_lists.full_first(visibility.block_table(q.shape[1], rows, UNIT), units - 1)


def _key_tiles(visibility: Visibility, q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Blocks of 64 keys in the order in which they are paired to tiles, and for each tile the
    blocks of 64 rows with the kinds of its halves.

    Keys that end together are seen by the same rows, so blocks are paired by their `until`; those
    that last longest, which have most to do, come first.
    """
    table = visibility.block_table(q.shape[1], UNIT, UNIT)
    B, blocks, num_keys = table.shape
    until = jnp.pad(visibility.until, ((0, 0), (0, -visibility.num_keys % UNIT)))
    latest = jnp.max(until.reshape(B, num_keys, UNIT), axis=2)
    place = jax.lax.broadcasted_iota(jnp.int32, latest.shape, 1)
    _, order = jax.lax.sort((-latest, place), num_keys=1, is_stable=True)
    table = jnp.take_along_axis(table, order[:, None], axis=2)
    tail = num_keys % COMPUTE
    order = jnp.pad(order, ((0, 0), (0, tail)), constant_values=num_keys)
    table = jnp.pad(table, ((0, 0), (0, 0), (0, tail)))
    kinds = table.reshape(B, blocks, -1, COMPUTE).swapaxes(1, 2).reshape(B, -1, blocks * COMPUTE)
    lists = _block_lists.full_first_halves(kinds, COMPUTE, backward_kernels.KIND_BITS)
    return order, *lists


def _splits(q: jax.Array, k: jax.Array) -> int:
    """Parts of the query heads of a group that get their own programs in the dk/dv kernel.

    The first keys are seen by most rows: with few tiles their programs would be the whole time.
    """
    B, S, K, _ = k.shape
    programs, G, splits = B * K * -(-S // (COMPUTE * UNIT)), q.shape[2] // K, 1
    while programs * splits < configs.PROGRAMS and G % (2 * splits) == 0:
        splits *= 2
    return splits
