# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of token_importance against loops, interpreted on a CPU.

Run by test_selection_triton in a process of its own: Triton decides at import whether it
interprets.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.token_importance import token_importance
from pallas_kernels import selection_triton_config as configs
from pallas_kernels import triton_call
from tests.ops.op_cases import arrays, jit
from tests.ops.op_tolerances import assert_close
from tests.ops.test_token_importance import by_loops
from tests.pallas_kernels import triton_interpreter

_SMALL = {
    "scan": configs.Config(32, 4, steps=2),
    "normalizer": configs.Config(16, 4),
    "vote": configs.Config(16, 4),
    "window": configs.Config(32, 4, rows=16),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    triton_interpreter.interpret(monkeypatch)
    context = dispatch.target_platform("gpu"), triton_call.target_capability(90)
    with context[0], context[1], configs.override(**_SMALL):
        yield


def problem(W=1, N=4, K=2, H=64, S=45, B=1, dtype="float32", key_dtype=None, seed=0):
    q, k = arrays(seed, (B, W, N, H), (B, S, K, H), dtype=dtype)
    k = k.astype(key_dtype or dtype)
    rng = np.random.default_rng(seed)
    begin = jnp.asarray(rng.integers(0, 20, B), jnp.int32)
    end = jnp.asarray(rng.integers(15, S + 1, (B, W)), jnp.int32)
    return {"q": q, "k": k, "begin": begin, "end": end}


def run(given, **settings):
    held = {name: x for name, x in settings.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in settings.items() if name not in held}
    op = partial(token_importance, **static, return_lse=True, implementation="triton")
    return jit(lambda arrays: op(**arrays))(given | held)


def compare(given, dtype="float32", layer=None, **settings):
    actual = run(given, **settings, **({} if layer is None else {"layer": layer}))
    if layer is not None:
        given = given | {"k": given["k"][layer]}
        settings = {n: x[layer] if n == "k_scale" else x for n, x in settings.items()}
    assert_close(actual, by_loops(**given, **settings), dtype)


def weights(given, seed=1):
    B, W, N, _ = given["q"].shape
    rng = np.random.default_rng(seed)
    row, head = rng.normal(size=(B, W)), rng.normal(size=N)
    return {
        "row_weights": jnp.asarray(row, jnp.float32),
        "head_weights": jnp.asarray(head, jnp.float32),
    }


@pytest.mark.parametrize("W", [1, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_all_ways_of_putting_together(W, normalize):
    given = problem(W)
    ways = itertools.product(("sum", "mean", "max"), ("all", "kv", "query"))
    for index, (reduce, heads) in enumerate(ways):
        weighted = weights(given) if (index + normalize) % 3 else {}
        gqa = ("grouped", "modulo")[index % 2]
        compare(given, gqa=gqa, normalize=normalize, reduce=reduce, heads=heads, **weighted)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_batch_whose_rows_take_several_tiles(normalize):
    given = problem(9, S=77, B=2)
    compare(given, normalize=normalize, reduce="mean", gqa="modulo", **weights(given))


@pytest.mark.parametrize("W", [1, 5])
@pytest.mark.parametrize(("N", "K", "H"), [(2, 2, 128), (8, 1, 64), (7, 1, 64), (2, 1, 256)])
def test_grouped_heads_and_head_dims(W, N, K, H):
    compare(problem(W, N, K, H), heads="kv")
    compare(problem(W, N, K, H, dtype="bfloat16"), "float32", reduce="max")


@pytest.mark.parametrize(
    ("dtype", "key_dtype"),
    [("float32", "bfloat16"), ("float32", "float16"), ("float16", "bfloat16"),
     ("bfloat16", "float16"), ("bfloat16", "float32"), ("float16", "float16")],
)  # fmt: skip
def test_types_that_differ(dtype, key_dtype):
    """Products are as exact as those of the wider type."""
    for W in (1, 3):
        given = problem(W, S=20, dtype=dtype, key_dtype=key_dtype)
        given["q"] *= 3000 if dtype != "float16" else 1  # beyond float16 when summed
        compare(given, scale=1e-4)


@pytest.mark.parametrize("W", [1, 3])
@pytest.mark.parametrize("codes", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("dtype", "scale_dtype"), [("bfloat16", "bfloat16"), ("float32", "float32")]
)
def test_codes(W, codes, dtype, scale_dtype):
    given = problem(W, dtype=dtype)
    span = {"int8": 50, "float8_e4m3fn": 3}[codes]
    given["k"] = (span * given["k"].astype(jnp.float32)).astype(codes)
    (scales,) = arrays(5, given["k"].shape[:3], dtype=scale_dtype)
    k_scale = jnp.abs(scales) / span
    # normalised, one row keeps exponentials in float16
    compare(given, "float16" if W == 1 else "float32", k_scale=k_scale)
    compare(given, k_scale=k_scale, normalize=False, heads="query")
    if codes != "int8":
        compare(given, "float16" if W == 1 else "float32")


def test_every_code_of_float8():
    """Subnormal ones too: a query that picks one dimension reads the codes back."""
    every = np.arange(256, dtype=np.uint8)
    codes = every[(every & 0x7F) != 0x7F].view(jnp.float8_e4m3fn.dtype)
    k = np.zeros((1, len(codes), 1, 64), codes.dtype)
    k[0, :, 0, 7] = codes
    q = jnp.zeros((1, 1, 1, 64)).at[..., 7].set(1.0)
    ends = {"begin": jnp.zeros(1, jnp.int32), "end": jnp.full((1, 1), len(codes), jnp.int32)}
    scores, _ = run({"q": q, "k": jnp.asarray(k), **ends}, normalize=False, scale=1.0)
    np.testing.assert_array_equal(scores[0], codes.astype(np.float32))


@pytest.mark.parametrize("W", [1, 3])
@pytest.mark.parametrize("key_dtype", ["float32", "int8"])
def test_layers_of_a_stack(W, key_dtype):
    given = problem(W)
    (k,) = arrays(3, (3, *given["k"].shape))
    given["k"] = (20 * k).astype(key_dtype)
    scales = {"k_scale": jnp.abs(k[..., 0])} if key_dtype == "int8" else {}
    for layer in (0, 2):
        compare(given, "float16", layer=jnp.int32(layer), **scales)


@pytest.mark.parametrize("W", [1, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_ranges(W, normalize):
    """Nothing, one slot, whole blocks, everything; rows that see nothing beside rows that do."""
    ranges = [(0, 0), (7, 3), (44, 45), (16, 32), (0, 45), (31, 33)]
    given = problem(W, B=len(ranges))
    begin, end = (jnp.array(x, jnp.int32) for x in zip(*ranges, strict=True))
    given["begin"], given["end"] = begin, jnp.tile(end[:, None], (1, W))
    compare(given, reduce="max", normalize=normalize)
    if W > 1:
        given["end"] = given["end"].at[:, 0].set(0)
        compare(given, reduce="mean", normalize=normalize)


def test_slots_that_nobody_sees_have_no_influence():
    for W in (1, 3):
        given = problem(W, dtype="bfloat16")
        seen = np.zeros(given["k"].shape[:2], bool)
        for b, low in enumerate(given["begin"]):
            seen[b, low : max(given["end"][b])] = True
        other = {**given, "k": jnp.where(seen[..., None, None], given["k"], 300.0)}
        for heads in ("all", "query"):
            scores, lse = run(given, heads=heads)
            other_scores, other_lse = run(other, heads=heads)
            np.testing.assert_array_equal(scores, other_scores)
            np.testing.assert_array_equal(lse, other_lse)


def test_several_heads_of_a_program():
    given = problem(N=8, K=4)
    with configs.override(**_SMALL | {"scan": configs.Config(16, 4, steps=3, heads=2)}):
        compare(given, heads="kv")
        compare(given, heads="query", gqa="modulo")


def test_scale_and_large_products():
    for W in (1, 3):
        given = problem(W)
        compare(given, scale=-0.7)
        compare({**given, "q": 30 * given["q"]})
