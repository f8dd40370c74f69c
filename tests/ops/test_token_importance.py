# SPDX-License-Identifier: Apache-2.0
"""token_importance: the reference against loops, every implementation against the reference."""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ops import _token_importance_xla, dispatch
from ops.token_importance import GQA, HEADS, REDUCTIONS, token_importance
from tests.ops.op_cases import arrays, cpu_mesh, jit
from tests.ops.op_tolerances import assert_close

IMPLEMENTATIONS = ("xla",)  # those compared with the reference


def problem(B=3, W=3, S=11, N=4, K=2, H=5, dtype="float32"):
    """The sequences see a part of the cache, nothing, all of it; rows see more and more."""
    q, k = arrays(0, (B, W, N, H), (B, S, K, H), dtype=dtype)
    begin = np.array([2, 4, 0, 1])[:B]
    last = np.array([S - 2, 3, S, 2])[:B]
    end = last[:, None] - np.arange(W)[::-1]
    return {"q": q, "k": k, "begin": jnp.asarray(begin), "end": jnp.asarray(end)}


def by_loops(
    q,
    k,
    *,
    begin,
    end,
    k_scale=None,
    scale=None,
    normalize=True,
    row_weights=None,
    head_weights=None,
    reduce="sum",
    heads="all",
    gqa="grouped",
    return_lse=True,
):
    """What the op promises, one row, head and slot at a time, in float64."""
    q, k = (np.asarray(x).astype(np.float64) for x in (q, k))
    begin, end = np.asarray(begin), np.asarray(end)
    row_weights = None if row_weights is None else np.asarray(row_weights)
    head_weights = None if head_weights is None else np.asarray(head_weights)
    (B, W, N, H), (S, K) = q.shape, k.shape[1:3]
    if k_scale is not None:
        k = k * np.asarray(k_scale).astype(np.float64)[..., None]
    scale = H**-0.5 if scale is None else scale
    lse = np.full((B, W, N), -np.inf)
    gives = {}  # (sequence, group of heads, slot): what rows and heads give
    counted = np.zeros(B, int)
    for b, w in np.ndindex(B, W):
        seen = [j for j in range(S) if begin[b] <= j < end[b, w]]
        counted[b] += bool(seen)
        for n in range(N) if seen else ():
            read = n // (N // K) if gqa == "grouped" else n % K
            values = np.array([scale * q[b, w, n] @ k[b, j, read] for j in seen])
            lse[b, w, n] = np.log(np.exp(values - values.max()).sum()) + values.max()
            values = np.exp(values - lse[b, w, n]) if normalize else values
            values = values * (1 if row_weights is None else float(row_weights[b, w]))
            values = values * (1 if head_weights is None else float(head_weights[n]))
            group = {"all": 0, "kv": read, "query": n}[heads]
            for j, value in zip(seen, values, strict=True):
                gives.setdefault((b, group, j), []).append(value)
    groups = {"all": 1, "kv": K, "query": N}[heads]
    scores = np.full((B, groups, S), 0.0 if normalize else -np.inf)
    for (b, group, j), given in gives.items():
        scores[b, group, j] = max(given) if reduce == "max" else sum(given)
        if reduce == "mean":
            scores[b, group, j] /= counted[b] * (N // groups)
    return (scores[:, 0] if heads == "all" else scores), lse


def run(implementation, block, monkeypatch, arguments, **settings):
    """`arguments` are arrays; outputs are scores and log-sum-exp."""
    size = lambda rows, slots: min(block, slots)  # noqa: E731
    monkeypatch.setattr(_token_importance_xla, "block_size", size)
    return compiled(implementation, block, tuple(settings.items()))(arguments)


@cache
def compiled(implementation, block, settings):
    """`block` only separates the entries."""
    op = partial(token_importance, implementation=implementation, return_lse=True, **dict(settings))
    return jit(lambda arguments: op(**arguments))


WEIGHTS = {
    "row_weights": jnp.array([[0.5, -1.0, 2.0], [1.0, 1.0, 1.0], [0.0, 3.0, 1.0]]),
    "head_weights": jnp.array([1.0, -0.5, 0.0, 2.0]),
}
# Each mapping of query heads with half of the combinations, every pair of settings among them.
COMBINATIONS = [
    {
        "reduce": REDUCTIONS[reduce],
        "heads": HEADS[heads],
        "normalize": bool(normalize),
        "gqa": GQA[(reduce + heads + normalize) % 2],
    }
    for reduce, heads, normalize in product(range(3), range(3), range(2))
]


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_combination(implementation, settings, monkeypatch):
    """Blocks of 4 slots of 11, with weights of rows and heads."""
    arguments = problem() | WEIGHTS
    actual = run(implementation, 4, monkeypatch, arguments, **settings)
    assert_close(actual, by_loops(**arguments, **settings), "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("W", "N", "K", "H", "block", "settings"),
    [
        (1, 4, 2, 8, 4, {"gqa": "modulo", "heads": "kv"}),
        (1, 4, 4, 8, 64, {"reduce": "max"}),
        (3, 8, 1, 16, 64, {"reduce": "mean"}),
        (3, 2, 1, 16, 4, {"gqa": "modulo", "heads": "kv", "scale": 1.0}),
        (1, 2, 2, 8, 4, {"normalize": False, "scale": -0.5}),
    ],
)
def test_against_the_reference(implementation, W, N, K, H, block, settings, monkeypatch):
    """A fourth sequence ends where it begins."""
    arguments = problem(4, W, 21, N, K, H)
    actual = run(implementation, block, monkeypatch, arguments, **settings)
    assert_close(actual, run("reference", 0, monkeypatch, arguments, **settings), "float32")


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(implementation, dtype, monkeypatch):
    arguments = problem(H=16, dtype=dtype)
    scores, lse = run(implementation, 4, monkeypatch, arguments)
    assert (scores.dtype, lse.dtype) == ("float32", "float32")
    assert_close((scores, lse), by_loops(**arguments), "float32")  # products of these are exact
    arguments["q"] = arguments["q"].astype(jnp.float32) + 1e-3
    assert_close(run(implementation, 4, monkeypatch, arguments), by_loops(**arguments), "float32")


def shadow(codes, k):
    """Codes of 8 bits and the scale of each token and KV head."""
    largest = {"int8": 127.0, "float8_e4m3fn": 448.0}[codes]
    scale = jnp.max(jnp.abs(k), axis=-1) / largest
    scaled = k / scale[..., None]
    return (jnp.round(scaled) if codes == "int8" else scaled).astype(codes), scale


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize(("codes", "scales"), [("int8", "float32"), ("float8_e4m3fn", "bfloat16")])
@pytest.mark.parametrize("W", [1, 3])
def test_shadow_keys_of_a_stack(implementation, codes, scales, W, monkeypatch):
    """Layer 1 of 3; those beside it are full of NaN where their type has it."""
    arguments = problem(W=W, H=16)
    keys, k_scale = shadow(codes, arguments["k"])
    k_scale = k_scale.astype(scales)
    expected = by_loops(**{**arguments, "k": keys}, k_scale=k_scale)
    other = jnp.full_like(k_scale, jnp.nan)
    arguments |= {
        "k": jnp.stack([-keys, keys, -keys]),
        "k_scale": jnp.stack([other, k_scale, other]),
        "layer": jnp.int32(1),
    }
    assert_close(run(implementation, 4, monkeypatch, arguments), expected, "float32")


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("W", [1, 3])
def test_unseen_slots_have_no_influence(implementation, W, monkeypatch):
    """Ranges beyond the cache end with it."""
    arguments = problem(W=W)
    arguments["begin"] = arguments["begin"].at[2].set(-3)
    arguments["end"] = arguments["end"].at[2, -1].set(40)
    slots = jnp.arange(11)[None]
    last = arguments["end"].max(axis=1, keepdims=True)
    unseen = (slots < arguments["begin"][:, None]) | (slots >= last)
    dirty = jnp.where(unseen[:, :, None, None], 1e30, arguments["k"])
    expected = by_loops(**arguments)
    actual = run(implementation, 4, monkeypatch, {**arguments, "k": dirty})
    assert_close(actual, expected, "float32")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("W", [1, 2])
def test_a_batch_that_sees_nothing_reads_nothing(normalize, W, monkeypatch):
    arguments = problem(W=W)
    arguments["k"] = jnp.full_like(arguments["k"], jnp.nan)
    arguments["end"] = jnp.zeros_like(arguments["end"])
    scores, lse = run("xla", 4, monkeypatch, arguments, normalize=normalize)
    np.testing.assert_array_equal(scores, 0 if normalize else -np.inf)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize("W", [1, 3])
def test_votes_of_heads_on_several_devices(W, monkeypatch):
    """The soft vote is the sum over devices of what their heads give."""
    arguments = problem(2, W)
    expected = run("reference", 0, monkeypatch, arguments)[0]
    monkeypatch.setattr(_token_importance_xla, "block_size", lambda rows, slots: min(4, slots))

    def local(arguments):
        return jax.lax.psum(token_importance(**arguments, implementation="xla"), "tensor")

    heads = P("data", None, "tensor")
    specs = {"q": heads, "k": heads, "begin": P("data"), "end": P("data")}
    mesh = cpu_mesh(data=2, tensor=2)
    split = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P("data"))
    assert_close(jit(split)(arguments), expected, "float32")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_block_sizes_stay_within_their_budget(platform):
    size = _token_importance_xla.block_size
    with dispatch.target_platform(platform):
        assert size(32, 100) == 100
        assert size(32, 1 << 20) >= 4096
        assert size(512 * 32, 65536) * 512 * 32 * 4 <= 32 << 20
        assert size(10**6, 32768) == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"begin": jnp.zeros(2, jnp.int32)}, r"begin must be \(3,\) integers"),
        ({"end": jnp.zeros((3, 3))}, r"end must be \(3, 3\) integers"),
        ({"layer": jnp.int32(0)}, r"k must be \[L B S K H\] with layer"),
        ({"k": jnp.zeros((2, 3, 11, 2, 5))}, r"k must be \[B S K H\] without layer"),
        ({"k": jnp.zeros((3, 11, 2, 4))}, "do not fit together"),
        ({"k": jnp.zeros((3, 11, 3, 5))}, "multiple of key and value heads"),
        ({"k": jnp.zeros((3, 11, 2, 5), jnp.int8)}, "int8 need k_scale"),
        ({"k": jnp.zeros((3, 11, 2, 5), jnp.int32)}, "k must be floating point or one of int8"),
        ({"q": jnp.zeros((3, 3, 4, 5), jnp.int32)}, "q must be floating point"),
        ({"q": jnp.zeros((3, 0, 4, 5))}, "at least 1"),
        ({"k_scale": jnp.zeros((3, 11, 1))}, "k_scale must be k's shape without H"),
        ({"k_scale": jnp.zeros((3, 11, 2), jnp.int32)}, "k_scale must be float32 or bfloat16"),
        ({"row_weights": jnp.zeros(3)}, r"row_weights must have shape \(3, 3\)"),
        ({"head_weights": jnp.zeros(2)}, r"head_weights must have shape \(4,\)"),
        ({"reduce": "any"}, "reduce must be one of sum, mean, max"),
        ({"heads": "head"}, "heads must be one of all, kv, query"),
        ({"gqa": "mod"}, "gqa must be one of grouped, modulo"),
        ({"implementation": "mosaic"}, "unknown implementation"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        token_importance(**{**problem(), **change})


def test_layers_are_integers():
    arguments = problem()
    arguments["k"] = arguments["k"][None]
    for layer in (0.5, jnp.zeros(1, jnp.int32)):
        with pytest.raises(ValueError, match="layer must be one integer"):
            token_importance(**arguments, layer=layer)
