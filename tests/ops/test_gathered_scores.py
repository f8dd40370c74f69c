# SPDX-License-Identifier: Apache-2.0
"""gathered_scores against loops; changed arguments, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ops import dispatch
from ops.gathered_scores import gathered_scores
from tests.ops.op_cases import arrays, cpu_mesh, jit
from tests.ops.op_tolerances import assert_close

BOTH = pytest.mark.parametrize("implementation", ["reference", "xla"])


def problem(B=2, N=4, K=2, H=8, S=60, M=37, dtype="float32", by_head=False, seed=0):
    """Ascending lists, with what is senseless beyond their counts."""
    q, k = arrays(seed, (B, 1, N, H), (B, S, K, H), dtype=dtype)
    rng = np.random.default_rng(seed)
    shape = (B, K) if by_head else (B,)
    counts = rng.integers(M // 3, M + 1, shape)
    indices = np.full((*shape, M), -(10**9))
    for place in np.ndindex(shape):
        count = counts[place]
        indices[place][:count] = np.sort(rng.permutation(S)[:count])
    return {
        "q": q,
        "k": k,
        "indices": jnp.asarray(indices, jnp.int32),
        "counts": jnp.asarray(counts, jnp.int32),
    }


def by_loops(q, k, indices, counts, scale, gqa):
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    (B, _, N, _), K = q.shape, k.shape[2]
    out = np.full((B, N, indices.shape[-1]), -np.inf)
    for b in range(B):
        for n in range(N):
            head = n % K if gqa == "modulo" else n // (N // K)
            own = (b, head) if indices.ndim == 3 else (b,)
            for i in range(counts[own]):
                out[b, n, i] = scale * q[b, 0, n] @ k[b, indices[own][i], head]
    return out


def run(given, **settings):
    return jit(lambda given: gathered_scores(**given, **settings))(given)


@BOTH
@pytest.mark.parametrize("gqa", ["grouped", "modulo"])
@pytest.mark.parametrize("by_head", [False, True])
def test_products(implementation, gqa, by_head):
    for N, K in ((6, 2), (3, 3)):
        given = problem(N=N, K=K, by_head=by_head)
        expected = by_loops(*given.values(), 8**-0.5, gqa)
        actual = run(given, gqa=gqa, implementation=implementation)
        assert actual.dtype == jnp.float32
        assert_close(actual, expected, "float32")
    given |= {"k": jnp.stack([3 * given["k"], given["k"]]), "layer": jnp.int32(1)}
    actual = run(given, gqa=gqa, scale=8**-0.5, implementation=implementation)
    assert_close(actual, expected, "float32")


@BOTH
def test_every_argument_is_used(implementation):
    given = problem()
    given["indices"] = jnp.maximum(given["indices"], 0)
    before = run(given, implementation=implementation)
    q, k = arrays(1, given["q"].shape, given["k"].shape)
    fewer, others = given["counts"] - 1, 59 - given["indices"]
    for change in ({"q": q}, {"k": k}, {"counts": fewer}, {"indices": others}):
        after = run(given | change, implementation=implementation)
        assert not np.array_equal(before, after), list(change)
    for setting in ({"scale": 2.0}, {"gqa": "modulo"}):
        after = run(given, **setting, implementation=implementation)
        assert not np.array_equal(before, after), setting


def test_refusals():
    given = problem()
    for change, reason in (
        ({"q": jnp.zeros((2, 2, 4, 8))}, "one query row"),
        ({"k": given["k"].astype(jnp.int8)}, "16 bits or more"),
        ({"counts": given["counts"][:1]}, "counts must be"),
        ({"indices": given["indices"][:, None, None]}, "indices must be"),
        ({"gqa": "mean"}, "gqa must be"),
    ):
        with pytest.raises(ValueError, match=reason):
            gathered_scores(**given | change)
    with pytest.raises(dispatch.Unsupported, match="no pallas_tpu"):
        gathered_scores(**given, implementation="pallas_tpu")


def test_inside_shard_map():
    given = problem(by_head=True)
    expected = gathered_scores(**given, implementation="reference")
    heads = P(None, None, "tensor")
    sharded = jax.shard_map(
        lambda q, k, indices, counts: gathered_scores(q, k, indices, counts=counts),
        mesh=cpu_mesh(tensor=2),
        in_specs=(heads, heads, P(None, "tensor"), P(None, "tensor")),
        out_specs=P(None, "tensor"),
    )
    assert_close(jit(sharded)(*given.values()), expected, "float32")
