# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of gathered_attention against loops, interpreted on a CPU.

Run by test_selection_triton in a process of its own: Triton decides at import whether it
interprets.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.gathered_attention import gathered_attention
from pallas_kernels import selection_triton_config as configs
from pallas_kernels import triton_call
from tests.ops.op_cases import arrays, jit
from tests.ops.op_tolerances import assert_close
from tests.ops.test_gathered_attention import by_loops
from tests.pallas_kernels import triton_interpreter

_SMALL = {
    "attend": configs.Config(16, 4),
    "chunk": configs.Config(32, 4, rows=16),
    "gather": configs.Config(32, 4),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    triton_interpreter.interpret(monkeypatch)
    monkeypatch.setattr(configs, "PROGRAMS", 8)
    context = dispatch.target_platform("gpu"), triton_call.target_capability(90)
    with context[0], context[1], configs.override(**_SMALL):
        yield


def problem(T=1, N=4, K=2, H=64, S=90, M=45, B=2, dtype="float32", by_head=False, seed=0):
    """Lists that are not sorted, with what is senseless beyond their counts."""
    q, k, v = arrays(seed, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype=dtype)
    rng = np.random.default_rng(seed)
    shape = (B, K) if by_head else (B,)
    indices = np.stack([rng.permutation(S)[:M] for _ in range(np.prod(shape))]).reshape(*shape, M)
    counts = rng.integers(M // 3, M + 1, shape)
    indices[np.arange(M) >= counts[..., None]] = -(10**9)
    lengths = rng.integers(max(T, S // 2), S + 1, B)
    given = {"q": q, "k": k, "v": v, "indices": indices, "counts": counts, "lengths": lengths}
    return {
        name: jnp.asarray(x, x.dtype if name in "qkv" else jnp.int32) for name, x in given.items()
    }


def tables(given, sequences=1, heads=1):
    M, H = given["indices"].shape[-1], given["q"].shape[-1]
    (angles,) = arrays(7, (sequences, heads, M, H // 2))
    return jnp.cos(angles), jnp.sin(angles)


def run(given, **settings):
    held = {name: x for name, x in settings.items() if isinstance(x, jax.Array | tuple)}
    static = {name: x for name, x in settings.items() if name not in held}
    op = partial(gathered_attention, **static, return_lse=True, implementation="triton")
    return jit(lambda arrays: op(**arrays))(given | held)


def compare(given, layer=None, **settings):
    actual = run(given, **settings, **({} if layer is None else {"layer": layer}))
    if layer is not None:
        given = given | {name: given[name][layer] for name in "kv"}
    assert_close(actual, by_loops(**given, **settings), given["q"].dtype)


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize(("N", "K", "H"), [(2, 2, 128), (8, 1, 64), (7, 1, 64), (2, 1, 256)])
def test_grouped_heads_and_head_dims(T, N, K, H):
    compare(problem(T, N, K, H, B=1))


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("by_head", [False, True])
def test_keys_are_rotated_when_they_are_read(T, by_head):
    given = problem(T, by_head=by_head, dtype="bfloat16" if by_head else "float32")
    compare(given)
    compare(given, rope=tables(given))
    compare(given, rope=tables(given, 2, 2))


@pytest.mark.parametrize("T", [1, 7])
def test_float16_layers_of_a_stack(T):
    given = problem(T, dtype="float16")
    k, v = (jnp.stack([3 * x, x, 0 * x]) for x in (given["k"], given["v"]))
    given |= {"k": k, "v": v}
    for layer in (0, 1):
        compare(given, layer=jnp.int32(layer), scale=-0.2)


@pytest.mark.parametrize("T", [1, 7])
def test_short_and_empty_lists(T):
    given = problem(T, B=4)
    given["counts"] = jnp.array([0, 1, 16, 45], jnp.int32)
    given["indices"] = jnp.maximum(given["indices"], 0)
    given["lengths"] = jnp.array([50, 90, 3, 1], jnp.int32)
    compare(given)
    out, lse = run(given)
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(lse[0], -np.inf)


def test_listing_every_slot_is_attention_over_the_cache():
    given = problem(6, S=45)
    given["indices"] = jnp.tile(jnp.arange(45, dtype=jnp.int32), (2, 1))
    given["counts"] = given["lengths"] = jnp.array([45, 45], jnp.int32)
    out, _ = run(given)
    q, k, v = (given[name] for name in "qkv")
    mask = jnp.arange(45)[None] <= 39 + jnp.arange(6)[:, None]
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
    assert_close(out, expected, "float32")


def test_large_scores_do_not_overflow():
    for T in (1, 7):
        given = problem(T)
        compare({**given, "q": 40 * given["q"]})


def test_parts_that_nobody_sees():
    """Many programs for few entries."""
    given = problem(M=20)
    given["indices"] = jnp.maximum(given["indices"], 0)
    given["counts"] = jnp.array([3, 17], jnp.int32)
    compare(given)
