# SPDX-License-Identifier: Apache-2.0
"""Attention on TPU through Pallas: what the kernels serve, the list of tiles that they walk, their
layouts and padding, and the derivative.

The kernels see one list of the needed (query block, key block) tiles of all sequences, made on the
device inside jit: the packed codes of the needed entries of the block table, sorted. It has a
static length, an upper bound, and lives in the scalar memory of the core.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ops import _saved, _tpu, dispatch
from ops._varying import common_varying, varying_like
from ops.block_table import EMPTY
from ops.visibility import Visibility
from pallas_kernels import masked_attention_tpu as kernels
from pallas_kernels import masked_attention_tpu_backward as backward_kernels
from pallas_kernels import tpu_interpret
from pallas_kernels.masked_attention_tpu import FIRST, LAST, LOG2_E, BlockSizes, TileCode

_HEAD_DIMS = (64, 128, 256)
_DTYPES = ("bfloat16", "float32")
_LARGEST_GROUP = 32  # query heads that fit one tile of 128 rows each
_SCALAR_BYTES = 768 << 10  # of the 1 MiB that a core has; the rest is the compiler's
_LARGEST_KEY_BLOCK = 2048


class _Tiles(NamedTuple):
    codes: jax.Array  # [L] int32
    count: jax.Array  # int32


def masked_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    visibility: Visibility,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, H], [B, T, N]
    _check(q, k, v)
    chip = _tpu.chip()
    blocks = _fitting(block_sizes(chip, q, k), q, k, visibility)
    q, k, v, visibility = common_varying((q, k, v, visibility))
    call = _Call(scale, blocks, kernels.vmem_bytes(chip), tpu_interpret.current())
    return _attend(q, k, v, visibility, call)


def block_sizes(chip: str | None, q: jax.Array, k: jax.Array) -> BlockSizes:
    """Before the list of tiles is known to fit."""
    _, T, N, H = q.shape
    return kernels.block_sizes(chip, H, N // k.shape[2], T, k.shape[1], q.dtype.itemsize)


def _check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    _tpu.require()
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in _DTYPES:
        raise dispatch.Unsupported(
            f"pallas_tpu: q, k and v of types {q.dtype}, {k.dtype} and {v.dtype}; one of "
            f"{' and '.join(_DTYPES)} for all three is served"
        )
    head_dim, group = q.shape[3], q.shape[2] // k.shape[2]
    if head_dim not in _HEAD_DIMS:
        raise dispatch.Unsupported(f"pallas_tpu: head dim {head_dim}; 64, 128 and 256 are served")
    if group > _LARGEST_GROUP:
        raise dispatch.Unsupported(
            f"pallas_tpu: {group} query heads per key and value head; up to {_LARGEST_GROUP} are "
            "served"
        )


def _fitting(blocks: BlockSizes, q: jax.Array, k: jax.Array, visibility: Visibility) -> BlockSizes:
    """The blocks, with more keys where the list of tiles would not fit the scalar memory."""
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    causal = visibility.row_offset is None
    while (needed := 4 * B * _most_tiles(blocks, T, S, causal)) > _SCALAR_BYTES:
        keys = 2 * blocks.k
        if keys > _LARGEST_KEY_BLOCK or blocks.k >= S:
            raise dispatch.Unsupported(
                f"pallas_tpu: {B} sequences of {T} rows and {S} keys: the list of tiles takes up "
                f"to {needed >> 10} KiB, and the scalar memory has {_SCALAR_BYTES >> 10}; split "
                "the batch"
            )
        blocks = kernels.fit(dataclasses.replace(blocks, k=keys), T, S)
    return blocks


def _most_tiles(blocks: BlockSizes, T: int, S: int, causal: bool) -> int:
    """How many tiles one sequence can need, either way round; every block needs at least one."""
    nq, nk = -(-T // blocks.q), -(-S // blocks.k)
    if not causal:
        return nq * nk
    seen = sum(min(nk, -(-min((i + 1) * blocks.q, T) // blocks.k)) for i in range(nq))
    return seen + nk  # key blocks right of the last row need one each, too


@dataclasses.dataclass(frozen=True)
class _Call:
    """What does not depend on arrays."""

    scale: float
    blocks: BlockSizes
    vmem_bytes: int
    interpret: object

    @property
    def options(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, visibility, call):
    return _forward(q, k, v, visibility, call)


def _attend_fwd(q, k, v, visibility, call):
    out, lse = _saved.attention(*_forward(q, k, v, visibility, call))
    return (out, lse), (q, k, v, visibility, out, lse)


def _attend_bwd(call, saved, cotangents):
    return (*_backward(*saved, *cotangents, call), None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(q, k, v, visibility, call):
    blocks, K = call.blocks, k.shape[2]
    tiles = _tiles(visibility, q.shape[1], blocks, transposed=False)
    out, lse = kernels.forward(
        _to_rows(q, K, blocks),
        _to_keys(k, blocks),
        _to_keys(v, blocks),
        _vectors(visibility, blocks),
        _offsets(visibility, q),
        tiles.codes,
        tiles.count,
        **call.options,
    )
    return _from_rows(out, q), _from_statistic(lse, q)


def _backward(q, k, v, visibility, out, lse, d_out, d_lse, call):
    blocks, K, T = call.blocks, k.shape[2], q.shape[1]
    blind = lse == -jnp.inf
    shift = d_lse - jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    inputs = (
        _to_rows(q, K, blocks),
        _to_keys(k, blocks),
        _to_keys(v, blocks),
        _vectors(visibility, blocks),
        _to_rows(d_out, K, blocks),
        _to_statistic(jnp.where(blind, jnp.inf, lse * LOG2_E), K, blocks, jnp.inf),
        _to_statistic(jnp.where(blind, 0.0, shift), K, blocks, 0.0),
        _offsets(visibility, q),
    )
    by_queries = _tiles(visibility, T, blocks, transposed=False)
    by_keys = _tiles(visibility, T, blocks, transposed=True)
    dq = backward_kernels.d_queries(*inputs, *by_queries, **call.options)
    dk, dv = backward_kernels.d_keys_and_values(*inputs, *by_keys, **call.options)
    return _from_rows(dq, q), _from_keys(dk, k), _from_keys(dv, v)


def _tiles(
    visibility: Visibility, num_rows: int, blocks: BlockSizes, *, transposed: bool
) -> _Tiles:
    """The needed tiles, ordered by sequence, query block and key block (transposed: key block and
    query block).

    A block that meets nothing has one EMPTY tile, which makes the kernel write its zeros. It names
    the block that the tile before it has fetched, so nothing is fetched for it.
    """
    table = visibility.block_table(num_rows, blocks.q, blocks.k)
    most = visibility.batch * _most_tiles(
        blocks, num_rows, visibility.num_keys, visibility.row_offset is None
    )
    table = (jnp.swapaxes(table, 1, 2) if transposed else table).astype(jnp.int32)
    B, runs, places = table.shape
    place = jax.lax.broadcasted_iota(jnp.int32, table.shape, 2)
    needed = table != EMPTY
    first = jnp.min(jnp.where(needed, place, places), axis=2, keepdims=True)
    last = jnp.max(jnp.where(needed, place, -1), axis=2, keepdims=True)
    fetched = _last_fetched(last.reshape(B, runs), places)[..., None]
    first, last = (jnp.where(last < 0, fetched, x) for x in (first, last))
    listed = needed | (place == first)

    code = TileCode(runs, places)
    flags = table + jnp.where(place == first, FIRST, 0) + jnp.where(place == last, LAST, 0)
    batch, run = (jax.lax.broadcasted_iota(jnp.int32, table.shape, axis) for axis in (0, 1))
    codes = jnp.where(listed, code.pack(batch, run, place, flags), jnp.iinfo(jnp.int32).max)
    codes = jax.lax.sort(codes.reshape(-1), is_stable=False)[:most]
    count = jnp.sum(listed, dtype=jnp.int32)
    return _Tiles(jnp.where(jnp.arange(codes.size) < count, codes, 0), count)


def _last_fetched(last: jax.Array, places: int) -> jax.Array:
    """[B, runs]: the last place of the nearest run before that has one; -1 entries have none."""
    order = jnp.arange(last.size, dtype=jnp.int32)
    marked = jnp.where(last.reshape(-1) >= 0, order * places + last.reshape(-1), -1)
    return jnp.maximum(jax.lax.cummax(marked), 0).reshape(last.shape) % places


def _offsets(visibility: Visibility, q: jax.Array) -> jax.Array:
    if visibility.row_offset is not None:
        return visibility.row_offset
    return varying_like(jnp.zeros(q.shape[0], jnp.int32), q)


def _vectors(visibility: Visibility, blocks: BlockSizes) -> jax.Array:
    """[B, 1 or 3, S]; keys that fill up the last block have `until` 0, so nobody sees them."""
    vectors = [visibility.until]
    if visibility.hidden_from is not None:
        vectors += [visibility.hidden_from, visibility.hidden_until]
    return _pad(jnp.stack(vectors, axis=1), 2, blocks.k)


def _pad(x: jax.Array, axis: int, block: int, value: float = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=value)


def _to_rows(x: jax.Array, K: int, blocks: BlockSizes) -> jax.Array:
    """[B, T, N, H] -> [B, K, G, T, H]"""
    x = _pad(x, 1, blocks.q)
    B, T, N, H = x.shape
    return x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _from_rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """[B, K, G, T, H] -> [B, T, N, H]"""
    B, T, N, H = like.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, -1, N, H)[:, :T]


def _to_statistic(x: jax.Array, K: int, blocks: BlockSizes, padding: float) -> jax.Array:
    """[B, T, N] -> [B, K, T / rows, 1, G * rows]"""
    x = _pad(x, 1, blocks.q, padding)
    B, T, N = x.shape
    x = x.reshape(B, T // blocks.q, blocks.q, K, N // K).transpose(0, 3, 1, 4, 2)
    return x.reshape(B, K, T // blocks.q, 1, N // K * blocks.q)


def _from_statistic(x: jax.Array, like: jax.Array) -> jax.Array:
    """[B, K, T / rows, 1, G * rows] -> [B, T, N]"""
    B, T, N, _ = like.shape
    _, K, blocks, _, width = x.shape
    x = x.reshape(B, K, blocks, N // K, width * K // N).transpose(0, 2, 4, 1, 3)
    return x.reshape(B, -1, N)[:, :T]


def _to_keys(x: jax.Array, blocks: BlockSizes) -> jax.Array:
    """[B, S, K, H] -> [B, K, S, H]"""
    return _pad(x, 1, blocks.k).transpose(0, 2, 1, 3)


def _from_keys(x: jax.Array, like: jax.Array) -> jax.Array:
    """[B, K, S, H] -> [B, S, K, H]"""
    return x.transpose(0, 2, 1, 3)[:, : like.shape[1]]
