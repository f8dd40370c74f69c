# SPDX-License-Identifier: Apache-2.0
"""linear_log_prob on CUDA GPUs from Ampere on: cuBLAS products by chunks of rows, as in plain XLA,
with Triton kernels between them that read the logits once."""

import dataclasses

import jax
import jax.numpy as jnp

from ops import _linear_log_prob_xla as chunks
from ops import dispatch
from ops._varying import varying_like
from pallas_kernels import linear_log_prob_triton_config as configs
from pallas_kernels import triton_call

_DTYPES = ("bfloat16", "float16", "float32")


def linear_log_prob(
    x: jax.Array,  # [R, D]
    w: jax.Array,  # [V, D]
    targets: jax.Array,  # [R] int32
    weights: jax.Array | None,  # [R] float32
    *,
    softcap: float | None,
    valid_vocab: int | None,
    vocab_axis: str | None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    capability = _capability(x, w)
    config, vocab = configs.config(), w.shape[0]
    dtype = chunks.product_dtype(x.dtype)
    chunk, part = config.rows(x.shape[0], vocab, dtype.itemsize)
    passes = _TritonPasses(part, dtype.name, softcap, valid_vocab, config, capability)
    return chunks.by_chunks(x, w, targets, weights, vocab_axis, chunks.Settings(chunk, passes))


def _capability(x: jax.Array, w: jax.Array) -> int:
    """Raises Unsupported unless the kernels serve these arrays here."""
    platform = dispatch.current_platform()
    if platform != "gpu":
        raise dispatch.Unsupported(f"triton: runs on CUDA GPUs (here: {platform})")
    for dtype in (x.dtype, w.dtype):
        if dtype.name not in _DTYPES:
            raise dispatch.Unsupported(f"triton: type {dtype}; {', '.join(_DTYPES)} are served")
    if w.shape[0] >= 1 << 30:
        raise dispatch.Unsupported(f"triton: {w.shape[0]} rows of w; fewer than 2**30 are served")
    try:
        capability = triton_call.capability()
        triton_call.require()
    except triton_call.Missing as missing:
        raise dispatch.Unsupported(f"triton: {missing}") from None
    if capability < 80:
        raise dispatch.Unsupported(
            f"triton: compute capability {capability}; 80 and later is served"
        )
    return capability


def _kernels():
    # imports triton, which machines without a GPU need not have
    from pallas_kernels import linear_log_prob_triton

    return linear_log_prob_triton


@dataclasses.dataclass(frozen=True)
class _TritonPasses:
    """`part` rows of a chunk have logits at a time; their gradients are written side by side."""

    part: int
    dtype: str  # of gradients
    softcap: float | None
    valid_vocab: int | None
    config: configs.Config
    capability: int

    def statistics(self, chunk):
        found = [
            _kernels().statistics(self._logits(chunk, rows), targets[rows], limit, *self._launch)
            for targets, limit, rows in self._parts(chunk)
        ]
        return self._joined(found, chunk)

    def gradients(self, chunk, lse, d_lse, d_target):
        into = None
        for targets, limit, rows in self._parts(chunk):
            into = _kernels().gradients(
                self._logits(chunk, rows),
                targets[rows],
                limit,
                lse[rows],
                d_lse[rows],
                d_target[rows],
                into,
                rows.start,
                len(targets),
                jnp.dtype(self.dtype),
                *self._launch,
            )
        return varying_like(into, chunk.x)

    def weighted(self, chunk, weights):
        into, found = None, []
        for targets, limit, rows in self._parts(chunk):
            into, *statistics = _kernels().exponentials(
                self._logits(chunk, rows),
                targets[rows],
                limit,
                into,
                rows.start,
                len(targets),
                jnp.dtype(self.dtype),
                *self._launch,
            )
            found.append(statistics)
        lse, target_logit, inverse_total = self._joined(found, chunk)
        return lse, target_logit, varying_like(into, chunk.x), -weights * inverse_total

    @property
    def _launch(self):
        return self.softcap, self.config, self.capability

    def _parts(self, chunk):
        """(targets of the chunk as the kernels want them, limit, rows of the part)."""
        vocab, kernels = chunk.w.shape[0], _kernels()
        limit = jnp.int32(vocab)
        if self.valid_vocab is not None:
            limit = jnp.clip(self.valid_vocab - chunk.first, 0, vocab)
        targets = chunk.targets - chunk.first
        targets = jnp.where((targets >= 0) & (targets < limit), targets, kernels.ABSENT)
        targets = jnp.where(chunk.targets < 0, kernels.PADDING, targets)
        for start in range(0, len(targets), self.part):
            yield targets, limit.reshape(1), slice(start, start + self.part)

    def _logits(self, chunk, rows):
        return chunks.logits_of(chunk.x[rows], chunk.w)

    def _joined(self, found, chunk):
        statistics = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
        return varying_like(tuple(statistics), chunk.x)
