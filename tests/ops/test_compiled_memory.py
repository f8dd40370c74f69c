# SPDX-License-Identifier: Apache-2.0
"""What the compiler allocates at real lengths, without running anything."""

import jax
import jax.numpy as jnp
import pytest

from ops.linear_log_prob import linear_log_prob
from ops.masked_attention import masked_attention
from ops.visibility import Visibility

MIB = 1 << 20


def temporary_bytes(function, *shapes) -> int:
    compiled = jax.jit(function).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def shape(*dims, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.mark.parametrize(("backward", "bound"), [(False, 160 * MIB), (True, 256 * MIB)])
def test_attention_keeps_nothing_of_size_t_times_s(backward, bound):
    """A mask of one byte per pair would take 1024 MiB, the scores of the four heads 16384 MiB.

    The arrays themselves (q, k, v, out and the gradients in float32) are 32 MiB or less each.
    """
    length = 32768
    q, k = shape(1, length, 4, 64), shape(1, length, 2, 64)
    vector = shape(1, length, dtype="int32")
    mask = Visibility(vector, vector, vector)

    def loss(q, k, v, mask):
        out = masked_attention(q, k, v, mask, implementation="xla")
        return jnp.sum(out.astype(jnp.float32) ** 2)

    function = jax.grad(loss, (0, 1, 2)) if backward else loss
    assert temporary_bytes(function, q, k, k, mask) < bound


@pytest.mark.parametrize("weighted", [False, True])
def test_log_prob_keeps_a_chunk_of_the_logits(weighted):
    """The logits of 32k rows over 128k columns would take 16384 MiB in float32.

    The float32 sum of w's gradient takes 32 MiB here, a chunk of logits 64 MiB (128 rows) on CPU
    and 1024 MiB on GPU.
    """
    rows, vocab, width = 32768, 131072, 64
    x, w = shape(rows, width), shape(vocab, width)
    targets, weights = shape(rows, dtype="int32"), shape(rows, dtype="float32")

    def loss(x, w, targets, weights):
        if weighted:
            return linear_log_prob(x, w, targets, weights, implementation="xla")[0]
        return jnp.sum(linear_log_prob(x, w, targets, implementation="xla"))

    function = jax.value_and_grad(loss, (0, 1))
    bound = 2048 * MIB if jax.default_backend() == "gpu" else 320 * MIB
    assert temporary_bytes(function, x, w, targets, weights) < bound
