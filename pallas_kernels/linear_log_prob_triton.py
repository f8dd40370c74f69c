# SPDX-License-Identifier: Apache-2.0
"""Row kernels between the products of `linear_log_prob` on CUDA GPUs, in Triton.

The products x w^T, d w and d^T x stay with cuBLAS; one program takes one row of float32 logits and
reads it once:

- `statistics`: log-sum-exp and the target's logit;
- `gradients`: d_lse * softmax + d_target * onehot, for a log-sum-exp that is known;
- `exponentials`: statistics and unnormalised gradients in the same reading. The log-sum-exp is
  not known before the row ends, so exp(logit - base) is written relative to a `base` that is known
  at the start, the largest logit of the first block, and the total is handed back: the caller
  scales rows of the products by 1 / total, which commutes with both of them. The target's entry
  then becomes exp(logit - base) - total, computed in float32 before it is rounded, so a row whose
  target has probability 0.999 keeps the relative precision of its gradient. bfloat16 and float32
  hold exponentials of up to 88, so a base needs no more than to be near: only a row whose largest
  logit turns out more than `_SPREAD` above its base is read again.

Traffic at 32768 rows, D 2048, V 128256 and 3.0 TB/s, where each product takes 25.2 ms: one reading
of float32 logits 5.6 ms, one writing of bfloat16 gradients 2.8 ms, one reading and writing of the
float32 sum of dw 0.7 ms for each of 8 chunks. Weighted form, predicted:
3 * 25.2 + 5.6 + 2.8 + 8 * 0.7 = 89.6 ms, less what cuBLAS hides of the last (it adds in place while
it multiplies); XLA's own passes read the logits three times and wrote 16 chunks, 16.8 ms more.
General form: 4 * 25.2 + 2 * 5.6 + 2.8 + 8 * 0.7 = 120.4 ms by the same count, 16.8 - 5.6 ms less
than XLA's. XLA's passes measured 94 and 117.5 ms where this count gives 106.4 and 131.6: products
that alternate with passes over memory run at higher clocks than products alone, so about 80 and
107 ms are expected.
"""

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels import triton_call
from pallas_kernels.linear_log_prob_triton_config import Config

PADDING, ABSENT = -2, -1  # in place of a target: the row counts for nothing; no column here
_PADDING = tl.constexpr(PADDING)
_LOG2_E = tl.constexpr(1.4426950408889634)
_SPREAD = tl.constexpr(40.0)


@triton.jit
def _capped(logits, CAP: tl.constexpr):
    """Capped logits, and the derivative of the cap."""
    if CAP == 0.0:
        return logits, 1.0
    else:
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(logits * (2.0 / CAP * _LOG2_E)))
        return CAP * bent, 1.0 - bent * bent


@triton.jit
def _exponentials(logits, base, CAP: tl.constexpr):
    """Capped logits, their exponentials relative to base, and those times the cap's derivative."""
    logits, slope = _capped(logits, CAP)
    exponentials = tl.exp2((logits - base) * _LOG2_E)
    return logits, exponentials, exponentials * slope


@triton.jit
def _walk(
    row, out, limit, base,
    V: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, STAGES: tl.constexpr,
    WRITE: tl.constexpr,
):  # fmt: skip
    """Total and largest of a row; WRITE stores the exponentials times the cap's derivative."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    whole = limit // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        logits, new, bent = _exponentials(tl.load(row + start + lanes), base, CAP)
        total += new
        largest = tl.maximum(largest, logits)
        if WRITE:
            tl.store(out + start + lanes, bent.to(out.dtype.element_ty))
    for start in range(whole, V if WRITE else limit, BLOCK):
        column = start + lanes
        inside = column < limit
        logits, new, bent = _exponentials(tl.load(row + column, mask=inside, other=0.0), base, CAP)
        total += tl.where(inside, new, 0.0)
        largest = tl.maximum(largest, tl.where(inside, logits, float("-inf")))
        if WRITE:
            bent = tl.where(inside, bent, 0.0).to(out.dtype.element_ty)
            tl.store(out + column, bent, mask=column < V)
    return tl.sum(total, 0), tl.max(largest, 0)


@triton.jit
def _row_sum(
    row, out, limit,
    V: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, STAGES: tl.constexpr,
    WRITE: tl.constexpr,
):  # fmt: skip
    """(total, base): the sum of a row's exponentials relative to a base within `_SPREAD` of its
    largest logit."""
    column = tl.arange(0, BLOCK)
    inside = column < limit
    logits, _ = _capped(tl.load(row + column, mask=inside, other=0.0), CAP)
    base = tl.max(tl.where(inside, logits, float("-inf")), 0)
    base = tl.where(base == float("-inf"), 0.0, base)
    total, largest = _walk(row, out, limit, base, V, BLOCK, CAP, STAGES, WRITE)
    if largest - base > _SPREAD:
        base = largest
        total, largest = _walk(row, out, limit, base, V, BLOCK, CAP, STAGES, WRITE)
    return total, base


@triton.jit
def _log_sum_exp(total, base):
    empty = total == 0.0
    return tl.where(empty, float("-inf"), base + tl.log(tl.where(empty, 1.0, total)))


@triton.jit
def _statistics_kernel(
    logits, targets, limit, lse, target_logit,
    V: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * V
    target, limit = tl.load(targets + index), tl.load(limit)
    if target == _PADDING:
        tl.store(lse + index, 0.0)
        tl.store(target_logit + index, 0.0)
    else:
        total, base = _row_sum(row, row, limit, V, BLOCK, CAP, STAGES, False)
        chosen, _ = _capped(tl.load(row + target, mask=target >= 0, other=0.0), CAP)
        tl.store(lse + index, _log_sum_exp(total, base))
        tl.store(target_logit + index, tl.where(target >= 0, chosen, float("-inf")))


@triton.jit
def _exponentials_kernel(
    logits, targets, limit, _, first_row, out, lse, target_logit, inverse_total,
    V: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * V
    out += (first_row + index).to(tl.int64) * V
    target, limit = tl.load(targets + index), tl.load(limit)
    if target == _PADDING:
        nothing = tl.zeros([BLOCK], out.dtype.element_ty)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            tl.store(out + column, nothing, mask=column < V)
        tl.store(lse + index, 0.0)
        tl.store(target_logit + index, 0.0)
        tl.store(inverse_total + index, 0.0)
    else:
        total, base = _row_sum(row, out, limit, V, BLOCK, CAP, STAGES, True)
        chosen, slope = _capped(tl.load(row + target, mask=target >= 0, other=0.0), CAP)
        tl.debug_barrier()  # the target's entry was stored by another thread
        entry = (tl.exp2((chosen - base) * _LOG2_E) - total) * slope
        tl.store(out + target, entry.to(out.dtype.element_ty), mask=target >= 0)
        tl.store(lse + index, _log_sum_exp(total, base))
        tl.store(target_logit + index, tl.where(target >= 0, chosen, float("-inf")))
        tl.store(inverse_total + index, tl.where(total == 0.0, 0.0, 1.0 / total))


@triton.jit
def _gradients_kernel(
    logits, targets, limit, lse, d_lse, d_target, _, first_row, out,
    V: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * V
    out += (first_row + index).to(tl.int64) * V
    target, limit = tl.load(targets + index), tl.load(limit)
    if target == _PADDING:
        limit = 0
    base, scale, extra = tl.load(lse + index), tl.load(d_lse + index), tl.load(d_target + index)
    base = tl.where(base == float("-inf"), 0.0, base)
    lanes = tl.arange(0, BLOCK)
    whole = limit // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        read, slope = _capped(tl.load(row + start + lanes), CAP)
        d = scale * tl.exp2((read - base) * _LOG2_E)
        d += tl.where(start + lanes == target, extra, 0.0)
        tl.store(out + start + lanes, (d * slope).to(out.dtype.element_ty))
    for start in range(whole, V, BLOCK):
        column = start + lanes
        inside = column < limit
        read, slope = _capped(tl.load(row + column, mask=inside, other=0.0), CAP)
        d = scale * tl.exp2((read - base) * _LOG2_E) + tl.where(column == target, extra, 0.0)
        d = tl.where(inside, d * slope, 0.0)
        tl.store(out + column, d.to(out.dtype.element_ty), mask=column < V)


def statistics(
    logits: jax.Array,  # [R, V] float32, before the cap
    targets: jax.Array,  # [R] int32: a column below limit, ABSENT or PADDING
    limit: jax.Array,  # [1] int32: columns from here on are excluded
    softcap: float | None,
    config: Config,
    capability: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-sum-exp and target's logit, [R] float32 each; 0 for padding, else -inf where there is
    none."""
    launch = _Launch(softcap, config, capability)
    return launch(_statistics_kernel, (logits, targets, limit), (), (_per_row(logits),) * 2)


def exponentials(
    logits: jax.Array,  # [R, V] float32, before the cap
    targets: jax.Array,  # [R] int32, as in `statistics`
    limit: jax.Array,  # [1] int32
    into: jax.Array | None,  # [chunk, V], or None: a new one, of which other rows are undefined
    first_row: int,
    chunk: int,
    dtype: jnp.dtype,
    softcap: float | None,
    config: Config,
    capability: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`into` with rows first_row .. first_row + R replaced by gradients, log-sum-exp, target's
    logit, and the factor that the gradients of log_prob lack: d log_prob / d logits is minus
    factor * row."""
    shapes = (jax.ShapeDtypeStruct((chunk, logits.shape[1]), dtype), *(_per_row(logits),) * 3)
    launch = _Launch(softcap, config, capability)
    arrays = (logits, targets, limit)
    return launch(_exponentials_kernel, arrays, (into, first_row), shapes)


def gradients(
    logits: jax.Array,  # [R, V] float32, before the cap
    targets: jax.Array,  # [R] int32, as in `statistics`
    limit: jax.Array,  # [1] int32
    lse: jax.Array,  # [R] float32
    d_lse: jax.Array,  # [R] float32
    d_target: jax.Array,  # [R] float32
    into: jax.Array | None,  # as in `exponentials`
    first_row: int,
    chunk: int,
    dtype: jnp.dtype,
    softcap: float | None,
    config: Config,
    capability: int,
) -> jax.Array:
    """`into` with rows first_row .. first_row + R replaced by the gradients of the logits."""
    shapes = (jax.ShapeDtypeStruct((chunk, logits.shape[1]), dtype),)
    launch = _Launch(softcap, config, capability)
    arrays = (logits, targets, limit, lse, d_lse, d_target)
    return launch(_gradients_kernel, arrays, (into, first_row), shapes)[0]


def _per_row(logits: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(logits.shape[:1], jnp.float32)


class _Launch:
    def __init__(self, softcap: float | None, config: Config, capability: int):
        self.softcap, self.config, self.capability = softcap, config, capability

    def __call__(self, kernel, arrays, place, shapes) -> tuple[jax.Array, ...]:
        """`place`: the array that the first output is written into, or None, and its row."""
        rows, V = arrays[0].shape
        aliases = None
        if place:
            into, first_row = place
            if into is not None:
                aliases = {len(arrays): 0}
            # a pointer that the kernel does not follow stands for the array, or for none
            arrays = (*arrays, arrays[0] if into is None else into, np.int32(first_row).item())
        return triton_call.triton_call(
            kernel,
            *arrays,
            out_shape=shapes,
            grid=(rows,),
            num_warps=self.config.num_warps,
            num_stages=self.config.num_stages,
            capability=self.capability,
            name=f"linear_log_prob{kernel.__name__}",
            input_output_aliases=aliases,
            V=V,
            BLOCK=min(self.config.block, triton.next_power_of_2(V)),
            CAP=0.0 if self.softcap is None else self.softcap,
            STAGES=self.config.num_stages,
        )
