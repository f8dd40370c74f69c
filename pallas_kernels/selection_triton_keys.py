# SPDX-License-Identifier: Apache-2.0
"""Cached keys as the Triton kernels behind token selection read them, and queries that meet them.

Codes are converted where they are used: int8 is exact in bfloat16, float8_e4m3fn in float16. A
query that the type of the product does not hold is split into a sum of up to three that it does.
"""

from typing import NamedTuple

import jax
import numpy as np
import triton
import triton.language as tl

from pallas_kernels import triton_call


@triton.jit
def load_keys(
    k, slots, STRIDE: tl.constexpr, H: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr
):
    """The keys [slots, H] in the type of the product."""
    keys = tl.load(k + slots[:, None] * STRIDE + tl.arange(0, H)[None, :])
    if CODES == "int8":
        keys = keys.to(tl.bfloat16)
    if CODES == "float8":
        if NATIVE:
            keys = keys.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        else:
            # sign, four bits of exponent and three of mantissa, put where float16 has them: the
            # number times 2 ** -8
            keys = ((keys.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True)
    return keys


@triton.jit
def load_queries(q, rows, inside, H: tl.constexpr, TYPE: tl.constexpr, TERMS: tl.constexpr):
    """Queries that start at `rows`, as a sum of three tiles of type TYPE (those beyond TERMS are
    not used) times a power of two each."""
    place = rows[:, None] + tl.arange(0, H)[None, :]
    rest = tl.load(q + place, mask=inside[:, None], other=0).to(tl.float32)
    unit = tl.full([rest.shape[0]], 1.0, tl.float32)
    if tl.float16 == TYPE:
        largest = tl.max(tl.abs(rest), 1)
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.where(power > 0, power, 1.0)
        rest = rest / unit[:, None]
    first = rest.to(TYPE)
    second, third = first, first
    if TERMS > 1:
        rest -= first.to(tl.float32)
        second = rest.to(TYPE)
    if TERMS > 2:
        rest -= second.to(tl.float32)
        third = rest.to(TYPE)
    return first, second, third, unit


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def heads_of(key_head, members, G: tl.constexpr, K: tl.constexpr, MODULO: tl.constexpr):
    """The query heads that read a KV head, by their number among them."""
    if MODULO:
        return members * K + key_head
    return key_head * G + members


@triton.jit
def load_weights(weights, place, inside, WEIGHTED: tl.constexpr):
    if WEIGHTED:
        return tl.load(weights + place, mask=inside, other=0.0)
    return tl.where(inside, 1.0, 0.0)


class Keys(NamedTuple):
    """Cached keys and what of them is seen."""

    k: jax.Array  # [L, B, S, K, H]; float8_e4m3fn as int8
    k_scale: jax.Array | None  # [L, B, S, K]
    layer: jax.Array  # [1] int32
    begin: jax.Array  # [B] int32 in 0 .. S
    end: jax.Array  # [B, W] int32 in 0 .. S
    codes: str  # "int8", "float8" or "" for keys that are numbers
    scale: float


class Together(NamedTuple):
    """How rows and heads are put together."""

    row_weights: jax.Array | None  # [B, W] float32
    head_weights: jax.Array | None  # [N] float32
    reduce: str
    outputs: int  # 1, K or N
    modulo: bool
    normalize: bool


_TYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}


def constants(q: jax.Array, keys: Keys, modulo: bool, capability: int) -> dict[str, object]:
    """The constants that all kernels which read keys have."""
    B, _, N, H = q.shape
    product = {"int8": "bfloat16", "float8": "float16"}.get(keys.codes, keys.k.dtype.name)
    kept_bits = {"bfloat16": 8, "float16": 11, "float32": 24}
    return {
        "B": B,
        "N": N,
        "K": keys.k.shape[3],
        "H": H,
        "MODULO": modulo,
        "CODES": keys.codes,
        "NATIVE": _native(keys, capability),
        "SCALED": keys.k_scale is not None,
        "TYPE": _TYPES[product],
        "TERMS": -(-kept_bits[q.dtype.name] // kept_bits[product]),
    }


def _native(keys: Keys, capability: int) -> bool:
    """Whether the GPU converts these codes itself. The interpreter does not know how to."""
    return keys.codes == "float8" and capability >= 89 and not triton_call.interpreting()


def arrays(q: jax.Array, keys: Keys) -> tuple[jax.Array, ...]:
    # a pointer that the kernel does not follow stands for an array that is not given
    k_scale = keys.begin if keys.k_scale is None else keys.k_scale
    return q, keys.k, k_scale, keys.layer, keys.begin, keys.end


def scale_argument(keys: Keys, capability: int) -> np.float32:
    decoded = keys.codes == "float8" and not _native(keys, capability)
    return np.float32(keys.scale * (256.0 if decoded else 1.0))


def weights(keys: Keys, together: Together) -> tuple[jax.Array, jax.Array]:
    given = (together.row_weights, together.head_weights)
    return tuple(keys.begin if weights is None else weights for weights in given)


def reductions(together: Together) -> dict[str, object]:
    return {
        "OUTPUTS": together.outputs,
        "NORMALIZE": together.normalize,
        "BY_ROW": together.row_weights is not None,
        "BY_HEAD": together.head_weights is not None,
        "REDUCE": together.reduce,
    }
