# SPDX-License-Identifier: Apache-2.0
"""What the compiler allocates at real lengths, without running anything."""

import jax
import jax.numpy as jnp
import pytest

from ops.gathered_attention import gathered_attention
from ops.linear_log_prob import linear_log_prob
from ops.masked_attention import masked_attention
from ops.token_importance import token_importance
from ops.top_tokens import top_tokens
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


@pytest.mark.parametrize(("W", "bound"), [(1, 96 * MIB), (512, 160 * MIB)])
def test_importance_keeps_blocks_of_products(W, bound):
    """512 rows of 8 heads over 64k slots: the products would take 1024 MiB, a layer of keys is 128
    MiB and the stack 4 times that. One row keeps its products, 2 MiB."""
    q, k = shape(1, W, 8, 128), shape(4, 1, 65536, 8, 128)
    begin, end, layer = (shape(*dims, dtype="int32") for dims in ((1,), (1, W), ()))

    def score(q, k, begin, end, layer):
        return token_importance(q, k, begin=begin, end=end, layer=layer, implementation="xla")

    assert temporary_bytes(score, q, k, begin, end, layer) < bound


@pytest.mark.parametrize(("T", "bound"), [(1, 64 * MIB), (512, 256 * MIB)])
def test_gathered_attention_copies_what_is_listed(T, bound):
    """A layer of the cache is 2 x 128 MiB, the stack 4 times that; the lists name 2 x 5 MiB of it,
    which is multiplied in float32 on CPU. A block of scores takes 32 MiB."""
    q, k = shape(1, T, 32, 128), shape(4, 1, 65536, 8, 128)
    indices, one, layer = (shape(*dims, dtype="int32") for dims in ((1, 2688), (1,), ()))

    def attend(q, k, v, indices, counts, lengths, layer):
        return gathered_attention(
            q, k, v, indices, counts=counts, lengths=lengths, layer=layer, implementation="xla"
        )

    assert temporary_bytes(attend, q, k, k, indices, one, one, layer) < bound


def test_a_step_over_a_million_tokens_compiles():
    """32 layers of 2^20 tokens of 8 heads of 128 are 2^35 elements: no index counts them."""
    q, k = shape(1, 1, 32, 128), shape(32, 1, 1 << 20, 8, 128)
    length, layer = shape(1, dtype="int32"), shape(dtype="int32")

    def step(q, k, v, length, layer):
        votes = token_importance(
            q, k, begin=0 * length, end=length[:, None], layer=layer, implementation="xla"
        )
        top, counts = top_tokens(votes, 2048, begin=0 * length, end=length, implementation="xla")
        return gathered_attention(
            q, k, v, top, counts=counts, lengths=length, layer=layer, implementation="xla"
        )

    assert temporary_bytes(step, q, k, k, length, layer) < 512 * MIB
