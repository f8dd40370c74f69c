# SPDX-License-Identifier: Apache-2.0
"""The k largest of each row of float32 scores, ties to the lower slot, ascending, in Triton.

Scores become unsigned numbers in the same order. A short row is one program: it finds the k-th
largest bit by bit and compacts. Long rows are cut into pieces of one program each:
  count    once per digit of `bits`, from the highest: how many slots of the row have each digit,
           among those that share the digits already known of the k-th largest score
  tally    slots above that score, and equal to it, in every piece
  write    places follow from the tallies of the pieces before
Each kernel finds the digits known so far from the counts, which costs less than a launch. Counts
are added by atomics on integers, so results are the same in every run.

Roofline: scores stay in the cache between the kernels; the launches limit.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import selection_triton_config as configs
from pallas_kernels import triton_call

BITS = (8, 8, 8, 8)
_DIGITS = tl.constexpr(len(BITS))
_BINS = tl.constexpr(256)


@triton.jit
def _load(scores, slots, low, high):
    """(ordered scores as int64, whether in the range); 0, below every score, where not."""
    seen = (slots >= low) & (slots < high)
    values = tl.load(scores + slots, mask=seen, other=0.0)
    values = tl.where(values == 0.0, 0.0, values)  # -0.0 equals 0.0
    bits = values.to(tl.int32, bitcast=True)
    # the sign bit goes; negative numbers count backwards
    ordered = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    return tl.where(seen, ordered, 0), seen


@triton.jit
def _known(counts, wanted, KNOWN: tl.constexpr):
    """The first KNOWN digits of the score that `wanted` slots reach, and how many of those that
    share them are wanted."""
    prefix = tl.zeros([], tl.uint32)
    bins = tl.arange(0, _BINS)
    for digit in tl.static_range(KNOWN):
        number = tl.load(counts + digit * _BINS + bins)
        reaching = tl.cumsum(number, 0, reverse=True)
        found = tl.sum((reaching >= wanted).to(tl.int32), 0) - 1
        wanted -= tl.sum(tl.where(bins > found, number, 0), 0)
        prefix = prefix * 256 + found.to(tl.uint32)
    return prefix, wanted


@triton.jit
def count(
    scores, begin, end, before, S, pieces, k,
    counts,
    KNOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts [rows, digits, bins]: adds this piece's to those of digit KNOWN."""
    row = tl.program_id(0) // pieces
    low, high = tl.load(begin + row), tl.load(end + row)
    start = tl.program_id(0) % pieces * BLOCK
    counts += row * (_DIGITS * _BINS)
    if (start < high) & (start + BLOCK > low):
        wanted = tl.minimum(k, high - low)
        prefix, wanted = _known(counts, wanted, KNOWN)
        slots = start + tl.arange(0, BLOCK)
        ordered, shared = _load(scores + row.to(tl.int64) * S, slots, low, high)
        if KNOWN > 0:
            shared = shared & ((ordered >> (32 - 8 * KNOWN)) == prefix)
        digits = ((ordered >> (24 - 8 * KNOWN)) & 255).to(tl.int32)
        number = tl.histogram(digits, _BINS, mask=shared)
        bins = tl.arange(0, _BINS)
        tl.atomic_add(counts + KNOWN * _BINS + bins, number, mask=number > 0)


@triton.jit
def tally(
    scores, begin, end, counts, S, pieces, k,
    above, equal,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """above, equal [rows, pieces]: slots above the k-th largest score, and equal to it."""
    program = tl.program_id(0)
    row = program // pieces
    low, high = tl.load(begin + row), tl.load(end + row)
    start = program % pieces * BLOCK
    number_above, number_equal = 0, 0
    if (start < high) & (start + BLOCK > low):
        wanted = tl.minimum(k, high - low)
        threshold, _ = _known(counts + row * (_DIGITS * _BINS), wanted, _DIGITS)
        slots = start + tl.arange(0, BLOCK)
        ordered, seen = _load(scores + row.to(tl.int64) * S, slots, low, high)
        number_above = tl.sum((ordered > threshold).to(tl.int32), 0)
        number_equal = tl.sum((seen & (ordered == threshold)).to(tl.int32), 0)
    tl.store(above + program, number_above)
    tl.store(equal + program, number_equal)


@triton.jit
def _place(ordered, seen, threshold, wanted, equal_before):
    """(chosen, number of the chosen before each among these slots)."""
    equal = (seen & (ordered == threshold)).to(tl.int32)
    rank = equal_before + tl.cumsum(equal, 0) - equal
    chosen = (ordered > threshold) | ((equal == 1) & (rank < wanted))
    number = chosen.to(tl.int32)
    return chosen, tl.cumsum(number, 0) - number


@triton.jit
def _fill(indices, found, k, S, CHUNK: tl.constexpr):
    """S in the places from `found` on."""
    for start in range(found, k, CHUNK):
        place = start + tl.arange(0, CHUNK)
        tl.store(indices + place, place * 0 + S, mask=place < k)


@triton.jit
def write(
    scores, begin, end, counts, above, equal, S, pieces, k,
    indices, found,
    BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """indices [rows, k] and found [rows]. PIECES is a power of two that `pieces` fits in."""
    program = tl.program_id(0)
    row, piece = program // pieces, program % pieces
    low, high = tl.load(begin + row), tl.load(end + row)
    total = tl.maximum(tl.minimum(k, high - low), 0)
    indices += row.to(tl.int64) * k
    start = piece * BLOCK
    if (start < high) & (start + BLOCK > low):
        threshold, wanted = _known(counts + row * (_DIGITS * _BINS), total, _DIGITS)
        lanes = tl.arange(0, PIECES)
        earlier = lanes < piece
        above_before = tl.sum(tl.load(above + row * pieces + lanes, mask=earlier, other=0), 0)
        equal_before = tl.sum(tl.load(equal + row * pieces + lanes, mask=earlier, other=0), 0)
        slots = start + tl.arange(0, BLOCK)
        ordered, seen = _load(scores + row.to(tl.int64) * S, slots, low, high)
        chosen, before = _place(ordered, seen, threshold, wanted, equal_before)
        before += above_before + tl.minimum(equal_before, wanted)
        tl.store(indices + before, slots, mask=chosen)
    if piece == 0:
        tl.store(found + row, total)
        _fill(indices, total, k, S, 1024)


@triton.jit
def one_program(
    scores, begin, end, S, k,
    indices, found,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """indices [rows, k] and found [rows] of rows that BLOCK slots hold."""
    row = tl.program_id(0)
    low, high = tl.load(begin + row), tl.load(end + row)
    slots = tl.arange(0, BLOCK)
    ordered, seen = _load(scores + row.to(tl.int64) * S, slots, low, high)
    total = tl.maximum(tl.minimum(k, high - low), 0)
    # the largest number that `total` slots reach; every slot in the range is above 0
    threshold = tl.zeros([], tl.uint32)
    bit = tl.full([], 1, tl.uint32) << 31
    for _ in range(0, 32):
        higher = threshold | bit
        bit = bit >> 1
        reached = tl.sum((ordered >= higher).to(tl.int32), 0)
        threshold = tl.where(reached >= total, higher, threshold)
    wanted = total - tl.sum((ordered > threshold).to(tl.int32), 0)
    chosen, before = _place(ordered, seen, threshold, wanted, 0)
    indices += row.to(tl.int64) * k
    tl.store(indices + before, slots, mask=chosen)
    tl.store(found + row, total)
    _fill(indices, total, k, S, 1024)


def top_tokens(
    scores: jax.Array,  # [R, S] float32
    k: int,
    begin: jax.Array,  # [R] int32 in 0 .. S
    end: jax.Array,  # [R] int32 in 0 .. S
    capability: int,
) -> tuple[jax.Array, jax.Array]:
    """Indices [R, k] int32, ascending, S from counts on; counts [R] int32."""
    R, S = scores.shape
    chosen = (
        jax.ShapeDtypeStruct((R, k), jnp.int32),
        jax.ShapeDtypeStruct((R,), jnp.int32),
    )
    config = configs.config("one_program", capability)
    if config.block >= S:
        return triton_call.triton_call(
            one_program,
            scores,
            begin,
            end,
            S,
            k,
            out_shape=chosen,
            grid=(R,),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            capability=capability,
            name="top_tokens_one_program",
            BLOCK=max(16, triton.next_power_of_2(S)),
        )
    config = configs.config("count", capability)
    pieces = -(-S // config.block)
    shared = {
        "grid": (R * pieces,),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "capability": capability,
        "BLOCK": config.block,
    }
    rows = (scores, begin, end)
    numbers = jax.ShapeDtypeStruct((R, len(BITS), _BINS.value), jnp.int32)
    counts = begin  # what the first kernel does not read
    for digit in range(len(BITS)):
        (counts,) = triton_call.triton_call(
            count,
            *rows,
            counts,
            S,
            pieces,
            k,
            out_shape=(numbers,),
            name=f"top_tokens_count_{digit}",
            zeroed_outputs=(0,) if digit == 0 else (),
            input_output_aliases={3: 0} if digit else None,
            KNOWN=digit,
            **shared,
        )
    tallies = jax.ShapeDtypeStruct((R, pieces), jnp.int32)
    above, equal = triton_call.triton_call(
        tally,
        *rows,
        counts,
        S,
        pieces,
        k,
        out_shape=(tallies, tallies),
        name="top_tokens_tally",
        **shared,
    )
    return triton_call.triton_call(
        write,
        *rows,
        counts,
        above,
        equal,
        S,
        pieces,
        k,
        out_shape=chosen,
        name="top_tokens_write",
        PIECES=max(16, triton.next_power_of_2(pieces)),
        **shared,
    )
