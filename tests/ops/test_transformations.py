# SPDX-License-Identifier: Apache-2.0
"""The ops inside what models put around them: layers under scan, remat, shard_map, compilation for
TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from ops import _masked_attention_xla, dispatch
from ops.cached_attention import cached_attention
from ops.linear_log_prob import linear_log_prob
from ops.masked_attention import masked_attention
from tests.ops.op_cases import arrays, cpu_mesh, jit, visibility
from tests.ops.op_tolerances import assert_close

BLOCKS = _masked_attention_xla.BlockSizes(8, 8)


def layers(x, kernels, mask, implementation, remat):
    """A stack of attention layers under scan."""

    def layer(x, kernel):
        heads = x.reshape(*x.shape[:2], 4, -1)
        keys = (x @ kernel).reshape(*x.shape[:2], 4, -1)[:, :, :2]
        out = masked_attention(heads, keys, keys, mask, implementation=implementation)
        return x + out.reshape(x.shape), None

    layer = jax.checkpoint(layer) if remat else layer
    return jnp.sum(jnp.sin(jax.lax.scan(layer, x, kernels)[0]))


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_and_rematerialised_layers(remat, monkeypatch):
    monkeypatch.setattr(_masked_attention_xla, "block_sizes", lambda *shape: BLOCKS)
    x, kernels = arrays(0, (2, 20, 16), (3, 16, 16))
    kernels = 0.1 * kernels  # well conditioned, so that rounding is not amplified
    mask = visibility("tree", 2, 20)
    gradients = jit(jax.value_and_grad(layers, (0, 1)), static_argnums=(3, 4))
    expected = gradients(x, kernels, mask, "reference", False)
    assert_close(gradients(x, kernels, mask, "xla", remat), expected, "float32")


@pytest.mark.parametrize("inside", [False, True])
def test_attention_split_over_batch_and_heads(inside, monkeypatch):
    """Gradients around the shard_map, and inside it of a loss that is summed over the devices."""
    monkeypatch.setattr(_masked_attention_xla, "block_sizes", lambda *shape: BLOCKS)
    q, k, v = arrays(0, (2, 20, 4, 8), (2, 20, 2, 8), (2, 20, 2, 8))
    mask = visibility("documents", 2, 20)
    mesh = cpu_mesh(data=2, tensor=2)
    heads = P("data", None, "tensor")
    in_specs = (heads, heads, heads, P("data"))

    def loss(q, k, v, mask):
        out = masked_attention(q, k, v, mask, implementation="xla")
        return jnp.sum(jnp.sin(out))

    expected = jit(jax.grad(loss, (0, 1, 2)))(q, k, v, mask)
    if inside:
        local = jax.grad(lambda *a: jax.lax.psum(loss(*a), ("data", "tensor")), (0, 1, 2))
        split = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(heads,) * 3)
    else:
        attend = partial(masked_attention, implementation="xla")
        attend = jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=heads)
        split = jax.grad(lambda q, k, v, m: jnp.sum(jnp.sin(attend(q, k, v, m))), (0, 1, 2))
    assert_close(jit(split)(q, k, v, mask), expected, "float32")


def test_keys_shared_by_devices_get_the_sum_of_gradients(monkeypatch):
    """MQA under tensor parallelism: query heads are split, the one key head is whole everywhere."""
    monkeypatch.setattr(_masked_attention_xla, "block_sizes", lambda *shape: BLOCKS)
    q, k, v = arrays(0, (2, 20, 4, 8), (2, 20, 1, 8), (2, 20, 1, 8))
    mask = visibility("tree", 2, 20)
    mesh = cpu_mesh(tensor=4)
    heads = P(None, None, "tensor")

    def loss(attend, q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v, mask)))

    whole = partial(masked_attention, implementation="reference")
    split = jax.shard_map(
        partial(masked_attention, implementation="xla"),
        mesh=mesh,
        in_specs=(heads, P(), P(), P()),
        out_specs=heads,
    )
    expected = jit(jax.grad(partial(loss, whole), (0, 1, 2)))(q, k, v)
    assert_close(jit(jax.grad(partial(loss, split), (0, 1, 2)))(q, k, v), expected, "float32")


def test_cache_split_over_batch_and_heads(monkeypatch):
    q, k, v = arrays(0, (2, 3, 4, 8), (2, 300, 2, 8), (2, 300, 2, 8))
    lengths = jnp.array([290, 17], jnp.int32)
    mesh = cpu_mesh(data=2, tensor=2)
    heads = P("data", None, "tensor")

    def attend(q, k, v, lengths, implementation="xla"):
        return cached_attention(q, k, v, lengths=lengths, implementation=implementation)

    specs = {"in_specs": (heads, heads, heads, P("data")), "out_specs": heads}
    split = jit(jax.shard_map(attend, mesh=mesh, **specs))(q, k, v, lengths)
    expected = jit(partial(attend, implementation="reference"))(q, k, v, lengths)
    assert_close(split, expected, "float32")


def test_everything_lowers_for_tpu():
    """Dynamic trip counts and all; the chosen implementation is the one for the target platform."""
    vectors = visibility("hidden", 1, 2048)
    q, k = jnp.zeros((1, 2048, 4, 64), jnp.bfloat16), jnp.zeros((1, 2048, 2, 64), jnp.bfloat16)
    x, w = q.reshape(-1, 64), jnp.zeros((1000, 64), jnp.bfloat16)
    targets = jnp.zeros((len(x),), jnp.int32)

    def loss(q, k, x, w):
        out = masked_attention(q, k, k, vectors).astype(jnp.float32)
        total, _ = linear_log_prob(x, w, targets, jnp.ones(len(x)), 30.0, 990)
        return jnp.sum(out) + total + jnp.sum(linear_log_prob(x, w, targets))

    def decode(q, k):
        cache = jnp.concatenate([k, k], axis=1)
        return cached_attention(q[:, :1], cache, cache, lengths=jnp.array([100]))

    with dispatch.target_platform("tpu"):
        for function, arguments in ((jax.grad(loss, (0, 1, 2, 3)), (q, k, x, w)), (decode, (q, k))):
            lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
            assert "stablehlo.while" in lowered.as_text()
