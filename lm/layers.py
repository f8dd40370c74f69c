# SPDX-License-Identifier: Apache-2.0
"""The parts of a transformer layer: linear maps with optional adapters, RMSNorm, rotary
positions."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lm.config import LoraConfig, ModelConfig, RopeScaling

RopeTable = tuple[jax.Array, jax.Array]  # cos and sin, [B, T, 1, H/2] each


@jax.custom_vjp
def lookup(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows [...] int32 of a table [R, D], as [..., D] of its dtype; the gradient of a row that is
    read often is summed in float32.

    In bfloat16, sums of thousands would stop growing; and GPUs have no atomic addition of
    bfloat16 but a loop of tries, which stalls where many add to the same row.
    """
    return table[rows]


def _lookup_forward(table, rows):
    return table[rows], (table, rows)


def _lookup_backward(residuals, g):
    table, rows = residuals
    sums = jnp.zeros(table.shape, jnp.float32).at[rows].add(g.astype(jnp.float32))
    return sums.astype(table.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


class Linear(nnx.Module):
    """y = x W (+ b) (+ (alpha / rank) x A B), contracting the last `len(inputs)` axes of x."""

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        *,
        rngs: nnx.Rngs,
        bias: bool = False,
        init_scale: float = 1.0,
        lora: LoraConfig | None = None,
    ):
        fan_in = math.prod(inputs)
        stddev = init_scale / math.sqrt(fan_in)
        shape = (*inputs, *outputs)
        self.kernel = nnx.Param(stddev * jax.random.normal(rngs.params(), shape))
        if bias:
            self.bias = nnx.Param(jnp.zeros(tuple(outputs)))
        self.num_inputs = len(inputs)
        self.has_bias = bias
        self.lora_scale = 0.0
        if lora is not None and lora.rank:
            # A is random and B zero, so that the adapted model starts as the base model.
            noise = jax.random.normal(rngs.params(), (*inputs, lora.rank)) / math.sqrt(fan_in)
            self.lora_a = nnx.Param(noise)
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, *outputs)))
            self.lora_scale = lora.alpha / lora.rank

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self._dot(x, self.kernel[...], self.num_inputs)
        if self.has_bias:
            y = y + jnp.expand_dims(
                self.bias[...].astype(y.dtype), tuple(range(x.ndim - self.num_inputs))
            )
        if self.lora_scale:
            low = self._dot(x, self.lora_a[...], self.num_inputs)
            y = y + self._dot(low, self.lora_b[...], 1) * jnp.asarray(self.lora_scale, y.dtype)
        return y

    @staticmethod
    def _dot(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
        # As one plain matrix product: its transpose then needs no transposed copies of activations,
        # which
        # on CPU cost more than the products.
        leading, fan_in = x.shape[: x.ndim - axes], math.prod(kernel.shape[:axes])
        y = x.reshape(-1, fan_in) @ kernel.astype(x.dtype).reshape(fan_in, -1)
        return y.reshape(*leading, *kernel.shape[axes:])


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32; `plus_one` stores scale - 1, as Gemma
    does."""

    def __init__(self, dim: int, *, eps: float, plus_one: bool):
        self.scale = nnx.Param(jnp.zeros(dim) if plus_one else jnp.ones(dim))
        self.eps = eps
        self.plus_one = plus_one

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        scale = jnp.expand_dims(1.0 + scale if self.plus_one else scale, tuple(range(x.ndim - 1)))
        return (normed * scale).astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> tuple[jax.Array, float]:
    """Inverse frequencies [H/2] float32 in radians per position, and the factor on cos and sin."""
    half = config.head_dim // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / half
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3_frequencies(frequencies, scaling), 1.0
    return _yarn_frequencies(frequencies, scaling, config)


def _llama3_frequencies(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, a linear ramp
    between."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def _yarn_frequencies(
    frequencies: jax.Array, scaling: RopeScaling, config: ModelConfig
) -> tuple[jax.Array, float]:
    """YaRN (arXiv 2309.00071, section 3): a ramp over dimensions between the two rotation
    counts."""
    half = config.head_dim // 2

    def dimension(rotations: float) -> float:
        ratio = scaling.original_max_positions / (rotations * 2 * math.pi)
        return half * math.log(ratio) / math.log(config.rope_theta)

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    ramp = jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)
    stretched = ramp * frequencies / scaling.factor + (1.0 - ramp) * frequencies
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return stretched, factor


def rope_table(config: ModelConfig, positions: jax.Array) -> RopeTable:
    """cos and sin, each [B, T, 1, H/2] float32, for positions [B, T] int32."""
    frequencies, factor = rope_frequencies(config)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return jnp.cos(angles)[:, :, None] * factor, jnp.sin(angles)[:, :, None] * factor


def apply_rope(x: jax.Array, table: RopeTable | None) -> jax.Array:
    """Rotates the two halves of the head dim of x [B, T, N, H] against each other; None leaves
    x."""
    if table is None:
        return x
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
