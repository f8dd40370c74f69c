# SPDX-License-Identifier: Apache-2.0
"""No argument is silently ignored, by any implementation of any op.

Each argument is changed in turn. The reference has to notice (otherwise the change proves nothing),
and the implementation has to give what the reference gives before and after.
"""

import dataclasses
import inspect
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ops.cached_attention import cached_attention
from ops.gathered_attention import gathered_attention
from ops.linear_log_prob import linear_log_prob
from ops.masked_attention import masked_attention
from ops.pool_attention import pool_attention
from ops.ragged_attention import Tail, ragged_attention
from ops.sparse_attention import sparse_attention
from ops.token_importance import token_importance
from ops.top_tokens import top_tokens
from tests.ops.op_cases import arrays, cpu_mesh, jit, visibility
from tests.ops.op_tolerances import assert_close


def attention_arguments():
    q, k, v = arrays(0, (2, 10, 4, 8), (2, 10, 2, 8), (2, 10, 2, 8))
    return {"q": q, "k": k, "v": v, "visibility": visibility("hidden", 2, 10)}


def attention_changes():
    q, k, v = arrays(1, (2, 10, 4, 8), (2, 10, 2, 8), (2, 10, 2, 8))
    mask = visibility("hidden", 2, 10)
    fields = {
        "until": mask.until.at[:, 0].set(3),
        "hidden_from": mask.hidden_from + 1,
        "hidden_until": mask.hidden_until - 1,
        "row_offset": mask.row_offset - 2,
    }
    for field, value in fields.items():
        yield "visibility", dataclasses.replace(mask, **{field: value})
    yield from (("q", q), ("k", k), ("v", v), ("scale", 1.5), ("return_lse", True))


def log_prob_arguments():
    x, w = arrays(0, (12, 6), (20, 6))
    targets = jnp.asarray(np.arange(12) % 7, jnp.int32)
    return {"x": x, "w": w, "targets": targets}


def log_prob_changes():
    x, w = arrays(1, (12, 6), (20, 6))
    yield from (("x", x), ("w", w), ("targets", jnp.arange(12, dtype=jnp.int32)))
    yield from (("targets", jnp.full((12,), -1, jnp.int32)), ("weights", jnp.arange(12.0)))
    yield from (("softcap", 1.5), ("valid_vocab", 9))


def cache_arguments():
    """The second of two layers."""
    q, k, v = arrays(0, (2, 3, 4, 8), (2, 2, 10, 2, 8), (2, 2, 10, 2, 8))
    lengths = jnp.array([10, 5], jnp.int32)
    return {"q": q, "k": k, "v": v, "lengths": lengths, "layer": jnp.int32(1)}


def cache_changes():
    q, k, v = arrays(1, (2, 3, 4, 8), (2, 2, 10, 2, 8), (2, 2, 10, 2, 8))
    yield from (("q", q), ("k", k), ("v", v), ("lengths", jnp.array([9, 5], jnp.int32)))
    yield from (("layer", jnp.int32(0)), ("scale", 1.5), ("return_lse", True))


def importance_arguments():
    """The second of two layers, of codes with scales, under weights: what every argument acts
    on."""
    rng = np.random.default_rng(0)
    (q,) = arrays(0, (2, 3, 4, 8))
    codes = jnp.asarray(rng.integers(-100, 100, (2, 2, 10, 2, 8)), jnp.int8)
    return {
        "q": q,
        "k": codes,
        "k_scale": jnp.asarray(rng.random((2, 2, 10, 2)) * 0.02, jnp.float32),
        "layer": jnp.int32(1),
        "begin": jnp.array([1, 0], jnp.int32),
        "end": jnp.array([[7, 8, 9], [3, 4, 5]], jnp.int32),
        "row_weights": jnp.array([[1.0, 0.5, 2.0], [1.0, 1.0, 3.0]]),
        "head_weights": jnp.array([1.0, 2.0, 0.5, 1.0]),
    }


def importance_changes():
    before = importance_arguments()
    yield from (("q", before["q"] + 1), ("k", before["k"] // 2), ("layer", jnp.int32(0)))
    yield from (("k_scale", before["k_scale"] * 2), ("begin", before["begin"] + 1))
    yield from (("end", before["end"] - 1), ("row_weights", None), ("head_weights", None))
    yield from (("scale", 1.5), ("normalize", False), ("reduce", "mean"), ("reduce", "max"))
    yield from (("heads", "kv"), ("heads", "query"), ("gqa", "modulo"), ("return_lse", True))


def top_arguments():
    (scores,) = arrays(0, (2, 20))
    begin, end = jnp.array([2, 0], jnp.int32), jnp.array([18, 20], jnp.int32)
    return {"scores": scores, "k": 5, "begin": begin, "end": end}


def top_changes():
    best = jnp.argmax(top_arguments()["scores"][0, 2:18]) + 2
    yield from (("scores", arrays(1, (2, 20))[0]), ("k", 6))
    yield from (("begin", jnp.array([best + 1, 0])), ("end", jnp.array([best, 20])))


def gathered_arguments():
    """The second of two layers, with two rotations per entry."""
    q, k, v, angles = arrays(0, (2, 3, 4, 8), *((2, 2, 10, 2, 8),) * 2, (2, 2, 6, 4))
    return {
        "q": q,
        "k": k,
        "v": v,
        "layer": jnp.int32(1),
        "indices": jnp.array([[0, 2, 3, 5, 7, 8], [0, 1, 2, 3, 4, 6]], jnp.int32),
        "counts": jnp.array([6, 4], jnp.int32),
        "lengths": jnp.array([10, 5], jnp.int32),
        "rope": (jnp.cos(angles), jnp.sin(angles)),
    }


def gathered_changes():
    before = gathered_arguments()
    cos, sin = before["rope"]
    yield from ((name, before[name] + 1) for name in ("q", "k", "v", "indices"))
    yield from (("counts", before["counts"] - 1), ("lengths", before["lengths"] - 3))
    yield from (("layer", jnp.int32(0)), ("rope", None), ("rope", (cos, -sin)))
    yield from (("rope", (cos[:1, :1], sin[:1, :1])), ("scale", 1.5), ("return_lse", True))


def sparse_arguments():
    q, k, v = arrays(0, (2, 10, 4, 8), (2, 12, 2, 8), (2, 12, 2, 8))
    return {
        "q": q,
        "k": k,
        "v": v,
        "columns": jnp.array([[[0, 1, 4], [2, 3, 5]], [[0, 2, 6], [1, 2, 3]]], jnp.int32),
        "counts": jnp.array([[3, 2], [1, 3]], jnp.int32),
        "lengths": jnp.array([12, 10], jnp.int32),
        "row_offset": jnp.array([2, 0], jnp.int32),
        "band": 2,
        "block": 2,
    }


def sparse_changes():
    before = sparse_arguments()
    yield from ((name, 2 * before[name]) for name in ("q", "k", "v"))
    yield "columns", before["columns"] + 1
    yield from ((name, before[name] - 1) for name in ("counts", "lengths", "row_offset"))
    yield from (("band", 4), ("block", 3), ("scale", 1.5), ("return_lse", True))


def ragged_arguments():
    """The second of two layers."""
    q, k, v, tail_k, tail_v = arrays(0, (2, 3, 4, 8), *[(2, 2, 12, 8)] * 2, *[(2, 2, 5, 2, 8)] * 2)
    return {
        "q": q,
        "k": k,
        "v": v,
        "starts": jnp.array([[0, 7], [0, 2]], jnp.int32),
        "counts": jnp.array([[7, 5], [2, 9]], jnp.int32),
        "tail": Tail(tail_k, tail_v, jnp.array([5, 4], jnp.int32)),
        "layer": jnp.int32(1),
    }


def ragged_changes():
    before = ragged_arguments()
    tail = before["tail"]
    yield from ((name, before[name] + 1) for name in ("q", "k", "v"))
    yield "starts", jnp.array([[0, 6], [1, 3]], jnp.int32)
    yield from (("counts", before["counts"] - 1), ("layer", jnp.int32(0)), ("scale", 1.5))
    yield from (("tail", None), ("tail", tail._replace(lengths=tail.lengths - 1)))
    yield from (("tail", tail._replace(k=tail.k + 1)), ("tail", tail._replace(v=tail.v + 1)))
    yield "return_lse", True


def pool_arguments():
    """The second of two layers."""
    q, k, v = arrays(0, (2, 3, 4, 8), *((2, 2, 10, 2, 8),) * 2)
    rules = {
        "owners": [[0, 0, 1, 0, 2, 1, 0, 2, 0, 1], [0, 0, 0, 1, 0, 1, 0, 0, 1, 2]],
        "threads": [[0, 1, 2], [0, 1, 2]],
        "joined": [[0, 0, 1], [1, 0, 0]],
        "forks": [[9, 2, 4], [7, 3, 7]],
        "lengths": [9, 6],
    }
    rules = {name: jnp.asarray(x, jnp.int32) for name, x in rules.items()}
    return {"q": q, "k": k, "v": v, "layer": jnp.int32(1), **rules}


def pool_changes():
    before = pool_arguments()
    yield from ((name, before[name] + 1) for name in ("q", "v", "owners", "lengths"))
    yield "k", 2 * before["k"]
    yield from ((name, before[name] - 1) for name in ("threads", "joined", "forks"))
    yield from (("layer", jnp.int32(0)), ("scale", 1.5), ("return_lse", True))


OPS = {
    sparse_attention: (sparse_arguments, sparse_changes, ("xla",)),
    ragged_attention: (ragged_arguments, ragged_changes, ("xla",)),
    pool_attention: (pool_arguments, pool_changes, ("xla",)),
    token_importance: (importance_arguments, importance_changes, ("xla",)),
    top_tokens: (top_arguments, top_changes, ("xla",)),
    gathered_attention: (gathered_arguments, gathered_changes, ("xla",)),
    masked_attention: (attention_arguments, attention_changes, ("xla",)),
    linear_log_prob: (log_prob_arguments, log_prob_changes, ("xla",)),
    cached_attention: (cache_arguments, cache_changes, ("xla",)),
}


def call(op, implementation, arguments):
    """Python's own values are static, arrays and pytrees of them are traced."""
    is_static = lambda value: isinstance(value, (str, int, float))  # noqa: E731
    arrays = {name: value for name, value in arguments.items() if not is_static(value)}
    static = tuple((name, value) for name, value in arguments.items() if is_static(value))
    return compiled(op, implementation, static)(arrays)


@cache
def compiled(op, implementation, static):
    return jit(lambda arrays: op(**arrays, **dict(static), implementation=implementation))


def moved(before, after) -> bool:
    before, after = jax.tree.leaves(before), jax.tree.leaves(after)
    if [x.shape for x in before] != [x.shape for x in after]:
        return True
    return any(np.abs(a - b).max() > 1e-3 for a, b in zip(before, after, strict=True))


CASES = [
    pytest.param(
        op, name, index, implementation, id=f"{op.__name__}-{name}-{index}-{implementation}"
    )
    for op, (_, changes, implementations) in OPS.items()
    for index, (name, _) in enumerate(changes())
    for implementation in implementations
]


@pytest.mark.parametrize(("op", "name", "index", "implementation"), CASES)
def test_every_argument_is_used(op, name, index, implementation):
    arguments, changes, _ = OPS[op]
    before = arguments()
    after = {**before, name: list(changes())[index][1]}
    expected = call(op, "reference", after)
    assert moved(call(op, "reference", before), expected)
    assert_close(call(op, implementation, after), expected, "float32")


@pytest.mark.parametrize("op", OPS)
def test_every_argument_is_in_the_table(op):
    """`implementation` has its own tests; `vocab_axis` needs a mesh and is changed below."""
    changed = {name for name, _ in OPS[op][1]()} | {"implementation", "vocab_axis"}
    assert set(inspect.signature(op).parameters) <= changed


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_vocab_axis_is_used(implementation):
    """Without it a device would take its slice of w for the whole vocabulary."""
    arguments = log_prob_arguments()
    mesh = cpu_mesh(vocab=2)

    def split(vocab_axis):
        def local(x, w, targets):
            out = linear_log_prob(
                x, w, targets, vocab_axis=vocab_axis, implementation=implementation
            )
            return out if vocab_axis else jax.lax.pmean(out, "vocab")

        specs = {"in_specs": (P(), P("vocab"), P()), "out_specs": P()}
        return jit(jax.shard_map(local, mesh=mesh, **specs))(*arguments.values())

    whole = call(linear_log_prob, "reference", arguments)
    assert_close(split("vocab"), whole, "float32")
    assert moved(split(None), whole)
