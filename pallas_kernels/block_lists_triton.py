# SPDX-License-Identifier: Apache-2.0
"""Ranked blocks compacted into lists, in one small kernel: XLA would sort them, with ten launches
that take longer than attention over a short sequence should."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_call

RANK_SHIFT = 28  # rank << 28 | entry
_SPARE = tl.constexpr(16)  # a power of two above any number of spare places


@triton.jit
def compact(
    ranked_pointer, blank, count_pointer, entry_pointer, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One list: the entries of rank 0, then those of rank 1, then `blank`."""
    row = tl.program_id(0).to(tl.int64)
    ranked_pointer += row * LENGTH
    entry_pointer += row * WIDTH
    lanes = tl.arange(0, CHUNK)
    full = 0
    for start in range(0, LENGTH, CHUNK):
        inside = start + lanes < LENGTH
        ranked = tl.load(ranked_pointer + start + lanes, mask=inside, other=2 << SHIFT)
        full += tl.sum((ranked < (1 << SHIFT)).to(tl.int32), 0)
    next_full, next_other = full * 0, full
    for start in range(0, LENGTH, CHUNK):
        inside = start + lanes < LENGTH
        ranked = tl.load(ranked_pointer + start + lanes, mask=inside, other=2 << SHIFT)
        is_full = (ranked < (1 << SHIFT)).to(tl.int32)
        needed = (ranked < (2 << SHIFT)).to(tl.int32)
        is_other = needed - is_full
        place = tl.where(
            is_full == 1,
            next_full + tl.cumsum(is_full, 0) - 1,
            next_other + tl.cumsum(is_other, 0) - 1,
        )
        tl.store(entry_pointer + place, ranked & ((1 << SHIFT) - 1), mask=needed == 1)
        next_full += tl.sum(is_full, 0)
        next_other += tl.sum(is_other, 0)
    after = next_other + tl.arange(0, _SPARE)
    tl.store(entry_pointer + after, after * 0 + blank, mask=after < WIDTH)
    tl.store(count_pointer + row * 2, full)
    tl.store(count_pointer + row * 2 + 1, next_other)


def lists(
    ranked: jax.Array,  # [B, n, m] int32: rank << RANK_SHIFT | entry
    blank: int,
    spare: int,
    capability: int,
) -> tuple[jax.Array, jax.Array]:
    """Counts [B, n, 2] int32, of rank 0 and of ranks 0 and 1, and entries [B, n, m + spare] int32:
    rank 0, then rank 1, each as they come, then `spare` places `blank`; the rest is undefined."""
    B, n, m = ranked.shape
    return triton_call.triton_call(
        compact,
        ranked,
        blank,
        out_shape=(
            jax.ShapeDtypeStruct((B, n, 2), jnp.int32),
            jax.ShapeDtypeStruct((B, n, m + spare), jnp.int32),
        ),
        grid=(B * n,),
        num_warps=4,
        num_stages=1,
        capability=capability,
        name="block_lists",
        LENGTH=m,
        WIDTH=m + spare,
        CHUNK=min(1024, triton.next_power_of_2(m)),
        SHIFT=RANK_SHIFT,
    )
