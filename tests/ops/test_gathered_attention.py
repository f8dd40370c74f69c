# SPDX-License-Identifier: Apache-2.0
"""gathered_attention: the reference against loops, every implementation against the reference."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ops import _gathered_attention_xla
from ops.cached_attention import cached_attention
from ops.gathered_attention import gathered_attention
from ops.merge_attention import merge_attention
from tests.ops.op_cases import arrays, cpu_mesh, jit
from tests.ops.op_tolerances import assert_close

IMPLEMENTATIONS = ("xla",)  # those compared with the reference
every = pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])


def problem(T=3, per_head=False, B=3, S=21, N=4, K=2, H=6, M=11, dtype="float32"):
    """Unordered lists with repetitions: a partial one, an empty one and a full one (per KV head:
    of any length); what is not valid lies outside the cache. The second sequence is shorter
    than T."""
    q, k, v = arrays(0, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype=dtype)
    rng = np.random.default_rng(1)
    lists = (B, K) if per_head else (B,)
    lengths = np.array([S - 4, 2, S])[:B]
    indices = rng.integers(0, S, (*lists, M))
    counts = rng.integers(0, M + 1, lists) if per_head else np.array([M - 3, 4, M])[:B]
    counts[-1] = M
    counts[0] = 0 if per_head else counts[0]
    garbage = rng.choice([-1, 10**9, S], indices.shape)
    indices = np.where(np.arange(M) < counts[..., None], indices, garbage)
    arguments = {"indices": indices, "counts": counts, "lengths": lengths}
    arguments = {name: jnp.asarray(x, jnp.int32) for name, x in arguments.items()}
    return {"q": q, "k": k, "v": v, **arguments}


def by_loops(q, k, v, indices, *, counts, lengths, rope=None, scale=None):
    """What the op promises, one row and head at a time, in float64."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    indices, counts, lengths = (np.asarray(x) for x in (indices, counts, lengths))
    rope = None if rope is None else [np.asarray(x) for x in rope]
    (B, T, N, H), (K, M) = q.shape, (k.shape[2], indices.shape[-1])
    scale = H**-0.5 if scale is None else scale
    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        head = n // (N // K)
        listed = indices[b] if indices.ndim == 2 else indices[b, head]
        count = counts[b] if indices.ndim == 2 else counts[b, head]
        scores, values = [], []
        for i in range(int(count)):
            slot = int(listed[i])
            if slot > lengths[b] - T + t:
                continue
            key = k[b, slot, head]
            if rope is not None:
                cos, sin = (np.broadcast_to(x, (B, K, M, H // 2))[b, head, i] for x in rope)
                first, second = key[: H // 2], key[H // 2 :]
                key = np.concatenate([first * cos - second * sin, second * cos + first * sin])
            scores.append(scale * key @ q[b, t, n])
            values.append(v[b, slot, head])
        if scores:
            lse[b, t, n] = np.logaddexp.reduce(scores)
            out[b, t, n] = np.exp(scores - lse[b, t, n]) @ np.array(values)
    return out, lse


def run(implementation, block, monkeypatch, arguments, **settings):
    size = lambda rows, entries: min(block, entries)  # noqa: E731
    monkeypatch.setattr(_gathered_attention_xla, "block_size", size)
    return compiled(implementation, block, tuple(settings.items()))(arguments)


@cache
def compiled(implementation, block, settings):
    """`block` only separates the entries."""
    settings = {"implementation": implementation, "return_lse": True, **dict(settings)}
    return jit(lambda arguments: gathered_attention(**arguments, **settings))


@pytest.mark.parametrize(("implementation", "block"), [("reference", 0), ("xla", 4), ("xla", 64)])
@pytest.mark.parametrize(("T", "per_head"), [(1, False), (1, True), (3, False), (3, True)])
def test_is_the_definition(implementation, T, per_head, block, monkeypatch):
    arguments = problem(T, per_head)
    actual = run(implementation, block, monkeypatch, arguments, scale=0.3)
    assert_close(actual, by_loops(**arguments, scale=0.3), "float32")


@every
@pytest.mark.parametrize(("N", "K"), [(2, 2), (6, 1)])
def test_other_groups(implementation, N, K, monkeypatch):
    arguments = problem(N=N, K=K)
    assert_close(run(implementation, 4, monkeypatch, arguments), by_loops(**arguments), "float32")


@every
@pytest.mark.parametrize(
    ("sequences", "heads", "per_head"),
    [(1, 1, False), (3, 1, True), (1, 2, True), (3, 2, False), (3, 2, True)],
)
def test_keys_are_rotated_when_read(implementation, sequences, heads, per_head, monkeypatch):
    arguments = problem(per_head=per_head)
    angles = np.random.default_rng(2).uniform(-3, 3, (sequences, heads, 11, 3))
    arguments["rope"] = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    expected = by_loops(**arguments)
    assert_close(run(implementation, 4, monkeypatch, arguments), expected, "float32")


@every
def test_a_layer_of_a_stack(implementation, monkeypatch):
    """The layers beside it are full of NaN."""
    arguments = problem()
    expected = by_loops(**arguments)
    for name in ("k", "v"):
        other = jnp.full_like(arguments[name], jnp.nan)
        arguments[name] = jnp.stack([other, other, arguments[name], other])
    arguments["layer"] = jnp.int32(2)
    assert_close(run(implementation, 4, monkeypatch, arguments), expected, "float32")


@every
def test_only_listed_slots_are_read(implementation, monkeypatch):
    """Slot 0 may stand for entries that are not valid."""
    arguments = problem()
    expected = by_loops(**arguments)
    listed = np.zeros((3, 21), bool)
    listed[:, 0] = True
    for b in range(3):
        listed[b, np.asarray(arguments["indices"])[b, : arguments["counts"][b]]] = True
    for name in ("k", "v"):
        arguments[name] = jnp.where(listed[:, :, None, None], arguments[name], jnp.nan)
    assert_close(run(implementation, 4, monkeypatch, arguments), expected, "float32")


@every
@pytest.mark.parametrize("T", [1, 4])
def test_listing_everything_is_attention_over_the_cache(implementation, T, monkeypatch):
    q, k, v = arrays(0, (3, T, 4, 8), (3, 21, 2, 8), (3, 21, 2, 8))
    lengths = jnp.array([21, 13, 2], jnp.int32)
    whole = lambda q, k, v, n: cached_attention(q, k, v, lengths=n, return_lse=True)  # noqa: E731
    expected = jit(whole)(q, k, v, lengths)
    indices = jnp.broadcast_to(jnp.arange(21), (3, 21))
    arguments = {"q": q, "k": k, "v": v, "indices": indices, "counts": lengths, "lengths": lengths}
    assert_close(run(implementation, 8, monkeypatch, arguments), expected, "float32")


@every
def test_halves_of_a_list_merge_into_the_whole(implementation, monkeypatch):
    arguments = problem()
    expected = run("reference", 0, monkeypatch, arguments)
    first = {**arguments, "indices": arguments["indices"][:, :5]}
    second = {**arguments, "indices": arguments["indices"][:, 5:]}
    first["counts"] = jnp.minimum(arguments["counts"], 5)
    second["counts"] = jnp.maximum(arguments["counts"] - 5, 0)
    parts = [run(implementation, 4, monkeypatch, half) for half in (first, second)]
    assert_close(merge_attention(parts), expected, "float32")


@every
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(implementation, dtype, monkeypatch):
    arguments = problem(H=16, dtype=dtype)
    expected = by_loops(**arguments)
    out, lse = run(implementation, 4, monkeypatch, arguments)
    assert (out.dtype, lse.dtype) == (dtype, "float32")
    assert_close((out, lse), expected, dtype)
    arguments["q"] = arguments["q"].astype(jnp.float32)
    out, lse = run(implementation, 4, monkeypatch, arguments)
    assert out.dtype == "float32"
    assert_close((out, lse), expected, "float32")


@pytest.mark.parametrize("per_head", [False, True])
def test_heads_and_batch_on_several_devices(per_head, monkeypatch):
    arguments = problem(per_head=per_head, B=2)
    expected = run("reference", 0, monkeypatch, arguments)
    monkeypatch.setattr(_gathered_attention_xla, "block_size", lambda rows, entries: 4)
    heads = P("data", None, "tensor")
    lists = P("data", "tensor") if per_head else P("data")
    specs = {"q": heads, "k": heads, "v": heads, "indices": lists, "counts": lists}
    specs["lengths"] = P("data")
    split = jax.shard_map(
        lambda a: gathered_attention(**a, return_lse=True, implementation="xla"),
        mesh=cpu_mesh(data=2, tensor=2),
        in_specs=(specs,),
        out_specs=(heads, heads),
    )
    assert_close(jit(split)(arguments), expected, "float32")


def test_block_sizes_stay_within_their_budget():
    size = _gathered_attention_xla.block_size
    assert size(32, 2688) == 2688
    assert size(512 * 32, 2688) * 512 * 32 * 4 <= 32 << 20
    assert size(10**6, 2688) == 128


COS = jnp.zeros((1, 1, 11, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": jnp.zeros((3, 3, 11), jnp.int32)}, r"indices must be \[3, M\] or \[3, 2, M\]"),
        ({"indices": jnp.zeros((3, 11))}, "at least one integer per list"),
        ({"counts": jnp.zeros((3, 2), jnp.int32)}, r"counts must be \(3,\) integers"),
        ({"lengths": jnp.zeros(3)}, r"lengths must be \(3,\) integers"),
        ({"q": jnp.zeros((3, 22, 4, 6))}, "22 new tokens do not fit a cache of 21 slots"),
        ({"v": jnp.zeros((3, 21, 1, 6))}, "do not fit together"),
        ({"layer": jnp.int32(0)}, r"k must be \[L B S K H\] with layer"),
        ({"k": jnp.zeros((3, 21, 2, 6), jnp.float8_e4m3fn)}, "must have 16 bits or more"),
        ({"rope": (COS, COS, COS)}, "rope is"),
        ({"rope": (COS, COS[:, :, :4])}, "cos and sin must be"),
        ({"rope": (COS[:, :, :4],) * 2}, "cos and sin must be"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gathered_attention(**{**problem(), **change})
