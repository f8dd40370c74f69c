# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of gathered_scores against the reference, interpreted on a CPU.

Run by test_selection_triton in a process of its own: Triton decides at import whether it
interprets.
"""

import jax.numpy as jnp
import pytest

from ops import dispatch
from pallas_kernels import selection_triton_config as configs
from pallas_kernels import triton_call
from tests.ops.op_tolerances import assert_close
from tests.ops.test_gathered_scores import problem, run
from tests.pallas_kernels import triton_interpreter


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    triton_interpreter.interpret(monkeypatch)
    context = dispatch.target_platform("gpu"), triton_call.target_capability(90)
    with context[0], context[1], configs.override(candidates=configs.Config(32, 4)):
        yield


def compare(given, **settings):
    expected = run(given, **settings, implementation="reference")
    actual = run(given, **settings, implementation="triton")
    assert_close(actual, expected, "float32")


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("gqa", ["grouped", "modulo"])
def test_lists(by_head, gqa):
    compare(problem(H=64, by_head=by_head), gqa=gqa, scale=-0.4)


@pytest.mark.parametrize(("dtype", "key_dtype"), [("bfloat16", "bfloat16"), ("float32", "float16")])
def test_types_and_layers(dtype, key_dtype):
    given = problem(N=7, K=1, H=128, dtype=dtype)
    k = given["k"].astype(key_dtype)
    compare(given | {"k": jnp.stack([0 * k, k])}, layer=1)
