# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of pool_attention against loops, interpreted on a CPU.

Run by test_selection_triton in a process of its own: Triton decides at import whether it
interprets.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.cached_attention import cached_attention
from ops.pool_attention import pool_attention
from pallas_kernels import selection_triton_config as configs
from pallas_kernels import triton_call
from tests.ops.op_cases import arrays, jit
from tests.ops.op_tolerances import assert_close
from tests.ops.test_pool_attention import by_loops, problem
from tests.pallas_kernels import triton_interpreter


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    triton_interpreter.interpret(monkeypatch)
    monkeypatch.setattr(configs, "PROGRAMS", 8)
    context = dispatch.target_platform("gpu"), triton_call.target_capability(90)
    with context[0], context[1], configs.override(pool=configs.Config(16, 4, rows=16)):
        yield


def run(given, **settings):
    settings |= {"return_lse": True, "implementation": "triton"}
    return jit(lambda given: pool_attention(**given, **settings))(given)


@pytest.mark.parametrize(
    ("T", "N", "K", "H"), [(5, 4, 2, 64), (9, 4, 1, 64), (1, 2, 2, 128), (3, 7, 1, 256)]
)
def test_rows_in_tiles_and_slots_in_parts(T, N, K, H):
    """36 rows of a KV head are three tiles; 70 slots are five blocks."""
    given = problem(T, B=2, S=70, N=N, K=K, H=H)
    assert_close(run(given, scale=-0.2), by_loops(given, -0.2), "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_layer_of_a_stack_in_half_precision(dtype):
    given = problem(B=2, S=40, H=64, dtype=dtype)
    expected = by_loops(given)
    for name in ("k", "v"):
        other = jnp.full_like(given[name], jnp.nan)
        given[name] = jnp.stack([other, given[name], other])
    assert_close(run(given | {"layer": jnp.int32(1)}), expected, dtype)


def test_only_what_is_filled_is_read():
    """Also an empty sequence: parts that nobody sees."""
    given = problem(S=70, H=64) | {"lengths": jnp.array([33, 0, 70], jnp.int32)}
    expected = by_loops(given)
    free = np.arange(70)[None] >= np.asarray(given["lengths"])[:, None]
    for name in ("k", "v"):
        given[name] = jnp.where(free[:, :, None, None], jnp.nan, given[name])
    assert_close(run(given), expected, "float32")


@pytest.mark.parametrize("T", [1, 4])
def test_new_tokens_over_a_cache(T):
    """Also an empty sequence, and one shorter than the new tokens."""
    q, k, v = arrays(0, (4, T, 4, 64), (3, 4, 70, 2, 64), (3, 4, 70, 2, 64))
    lengths = jnp.array([70, 33, 2, 0], jnp.int32)
    first, second = (
        jit(
            lambda q, k, v, name=name: cached_attention(
                q, k, v, lengths=lengths, layer=1, return_lse=True, implementation=name
            )
        )(q, k, v)
        for name in ("triton", "reference")
    )
    assert_close(first, second, "float32")
