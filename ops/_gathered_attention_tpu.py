# SPDX-License-Identifier: Apache-2.0
"""Attention over listed slots on TPU through Pallas: what the kernel serves, and its layouts."""

import dataclasses

import jax
import jax.numpy as jnp

from ops import _tpu, dispatch
from ops._cached_attention_reference import row_slots
from ops._token_importance_tpu import in_lanes
from ops._varying import common_varying
from pallas_kernels import gathered_attention_tpu as kernels
from pallas_kernels import masked_attention_tpu as attention_kernels
from pallas_kernels import tpu_interpret

_DTYPES = ("bfloat16", "float32")
_KV_HEADS = (2, 4, 8, 16, 32)
_LARGEST_CHUNK = 512  # rows of a KV head computed at once
_SUBLANES = 8
_SCALAR_BYTES = 256 << 10  # of the 1 MiB that a core has, twice


def gathered_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [L, B, S, K, H]
    v: jax.Array,  # [L, B, S, K, H]
    indices: jax.Array,  # [B, M] or [B, K, M] int32
    counts: jax.Array,  # [B] or [B, K] int32
    lengths: jax.Array,  # [B] int32
    layer: jax.Array,  # [] int32
    rope: tuple[jax.Array, jax.Array] | None,  # each [B or 1, K or 1, M, H/2] float32
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, H], [B, T, N]
    _check(q, k, v, indices, rope)
    B, T, N, _ = q.shape
    S, K = k.shape[2:4]
    settings = kernels.Settings(
        scale=scale,
        vmem_bytes=attention_kernels.vmem_bytes(_tpu.chip()),
        interpret=tpu_interpret.current(),
    )
    tokens = _tokens(q, k, indices.shape[1], rope is not None, settings.vmem_bytes)
    q, k, v, indices, counts, lengths, layer, rope = common_varying(
        (q, k, v, indices, counts, lengths, layer, rope)
    )
    layout = _Layout(B, T, N, K, tokens)
    M = indices.shape[1]
    entries = jnp.arange(M, dtype=jnp.int32)[None]
    valid = entries < counts[:, None]
    to_block = ((0, 0), (0, -M % settings.block))
    slots = jnp.pad(jnp.where(valid, jnp.clip(indices, 0, S - 1), 0), to_block)
    never = jnp.iinfo(jnp.int32).max
    visible_from = jnp.pad(jnp.where(valid, indices, never), to_block, constant_values=never)
    places = jnp.broadcast_to(row_slots(lengths, T)[:, :, None], (B, T, N // K))
    if rope is not None:
        rope = _full_tables(rope, to_block[1])
    out, lse = kernels.attend(
        layout.by_rows(q.astype(jnp.promote_types(q.dtype, k.dtype))),
        k,
        v,
        slots[:, None],
        visible_from[:, None],
        in_lanes(layout.by_rows(places, -1)),
        rope,
        layer[None],
        (jnp.clip(counts, 0, M) + settings.block - 1) // settings.block,
        q.dtype,
        settings=settings,
    )
    return layout.from_rows(out), layout.from_rows(lse[:, :, :, 0, : layout.rows])


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Of the queries in the kernel: [B, query blocks, KV heads * chunks, rows, ...], where the rows
    of a KV head are its query heads times the tokens of a block, cut into chunks."""

    B: int
    T: int
    N: int
    K: int
    tokens: int

    @property
    def group(self) -> int:
        return self.N // self.K

    @property
    def rows(self) -> int:
        return _rows(self.group * self.tokens)[0]

    def by_rows(self, x: jax.Array, padding: int = 0) -> jax.Array:
        """Of [B, T, N, ...], or of [B, T, G, ...] for what the KV heads share."""
        _, _, heads, *rest = x.shape
        heads = heads // self.group
        rows, chunks = _rows(self.group * self.tokens)
        none, tail = (0, 0), ((0, 0),) * len(rest)
        x = jnp.pad(x, (none, (0, -self.T % self.tokens), none, *tail), constant_values=padding)
        x = x.reshape(self.B, -1, self.tokens, heads, self.group, *rest)
        x = jnp.moveaxis(x, 2, 4)
        x = x.reshape(self.B, x.shape[1], heads, self.group * self.tokens, *rest)
        fill = (0, rows * chunks - self.group * self.tokens)
        x = jnp.pad(x, (none, none, none, fill, *tail), constant_values=padding)
        return x.reshape(self.B, x.shape[1], heads * chunks, rows, *rest)

    def from_rows(self, x: jax.Array) -> jax.Array:
        """[B, T, N, ...]"""
        blocks, rest = x.shape[1], x.shape[4:]
        x = x.reshape(self.B, blocks, self.K, -1, *rest)[:, :, :, : self.group * self.tokens]
        x = x.reshape(self.B, blocks, self.K, self.group, self.tokens, *rest)
        x = jnp.moveaxis(x, 4, 2).reshape(self.B, blocks * self.tokens, self.N, *rest)
        return x[:, : self.T]


def _rows(rows: int) -> tuple[int, int]:
    """Rows of a chunk and chunks, for so many rows of a KV head."""
    chunks = -(-rows // _LARGEST_CHUNK)
    step = kernels.LANES if chunks > 1 else _SUBLANES
    return -(-rows // (chunks * step)) * step, chunks


def _tokens(q: jax.Array, k: jax.Array, M: int, has_rope: bool, vmem_bytes: int) -> int:
    """Tokens of a block of queries: all of them, or as many as fit the memory of the core."""
    T, K = q.shape[1], k.shape[3]
    itemsize = jnp.promote_types(q.dtype, k.dtype).itemsize
    tokens = T
    while True:
        rows, chunks = _rows(q.shape[2] // K * tokens)
        needed = kernels.vmem_needed(K * chunks, rows, K, q.shape[3], M, itemsize, has_rope)
        if needed <= vmem_bytes * 3 // 4:  # the rest is the compiler's
            return tokens
        if tokens == 1:
            raise dispatch.Unsupported(
                f"pallas_tpu: {M} entries of {K} heads take {needed >> 20} MiB of the core's memory"
            )
        tokens = -(-tokens // 2)


def _full_tables(rope: tuple[jax.Array, jax.Array], to_block: tuple[int, int]):
    """[B or 1, M, H] each, so that x * cos + (halves of x exchanged) * sin is the rotation."""
    cos, sin = (jnp.pad(x[:, 0], ((0, 0), to_block, (0, 0))) for x in rope)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, indices: jax.Array, rope) -> None:
    _tpu.require()
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.dtype.name not in _DTYPES:
            raise dispatch.Unsupported(
                f"pallas_tpu: {name} of type {array.dtype}; {' and '.join(_DTYPES)} are served"
            )
    K, H = k.shape[3:]
    if H % kernels.LANES or H > 2 * kernels.LANES:
        raise dispatch.Unsupported(f"pallas_tpu: head dim {H}; 128 and 256 are served")
    if K not in _KV_HEADS:
        raise dispatch.Unsupported(
            f"pallas_tpu: {K} key and value heads; {', '.join(map(str, _KV_HEADS))} are served"
        )
    if indices.ndim == 3:
        raise dispatch.Unsupported(
            "pallas_tpu: lists per KV head; one head of a token cannot be copied alone"
        )
    if rope is not None and rope[0].shape[1] > 1:
        raise dispatch.Unsupported("pallas_tpu: rope tables per KV head")
    if 4 * indices.shape[1] > _SCALAR_BYTES:
        raise dispatch.Unsupported(
            f"pallas_tpu: {indices.shape[1]} entries per list; {_SCALAR_BYTES // 4} fit the scalar "
            "memory"
        )
