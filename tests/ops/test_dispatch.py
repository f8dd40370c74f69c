# SPDX-License-Identifier: Apache-2.0
"""Choosing an implementation: named ones serve or refuse, None takes the first that can and says so
once."""

import logging

import jax
import jax.numpy as jnp
import pytest

from ops import dispatch
from ops.cached_attention import cached_attention
from ops.dispatch import Unsupported
from ops.linear_log_prob import linear_log_prob
from ops.masked_attention import masked_attention
from ops.visibility import Visibility


def refuses(x):
    raise Unsupported(f"cannot do {x}")


def serves(x):
    return x + 1


def test_a_named_implementation_serves_or_refuses():
    candidates = {"reference": serves, "triton": refuses}
    assert dispatch.dispatch("op", "reference", candidates, 1) == 2
    with pytest.raises(Unsupported, match="cannot do 1"):
        dispatch.dispatch("op", "triton", candidates, 1)
    with pytest.raises(Unsupported, match="no pallas_tpu implementation of op"):
        dispatch.dispatch("op", "pallas_tpu", candidates, 1)
    with pytest.raises(ValueError, match=r"'cuda' of op; expected None or one of reference, xla"):
        dispatch.dispatch("op", "cuda", candidates, 1)


def test_none_takes_the_first_that_can(caplog):
    candidates = {"reference": refuses, "mosaic_gpu": refuses, "triton": serves, "xla": refuses}
    with caplog.at_level(logging.INFO, logger="absl"), dispatch.target_platform("gpu"):
        for _ in range(2):
            assert dispatch.dispatch("first_that_can", None, candidates, 1) == 2
    said = [record.getMessage() for record in caplog.records]
    assert said == ["first_that_can on gpu: triton (mosaic_gpu: cannot do 1)"]


def test_none_reports_every_reason_when_nothing_can():
    candidates = {"reference": serves, "mosaic_gpu": refuses, "xla": refuses}
    message = "no implementation of op on gpu: mosaic_gpu: cannot do 7; xla: cannot do 7"
    with dispatch.target_platform("gpu"), pytest.raises(Unsupported, match=message):
        dispatch.dispatch("op", None, candidates, 7)


def test_target_platform_is_part_of_jits_key():
    platform_now = jax.default_backend()
    traced = []
    function = jax.jit(lambda x: traced.append(dispatch.current_platform()) or x)
    function(1.0)
    with dispatch.target_platform("tpu"):
        function(1.0)
        assert dispatch.current_platform() == "tpu"
    function(1.0)
    assert traced == [platform_now, "tpu"]
    assert dispatch.current_platform() == platform_now
    with pytest.raises(ValueError, match=r"unknown platform 'npu'; expected one of \['cpu', 'gpu'"):
        dispatch.target_platform("npu")


def calls():
    x, chunk = jnp.ones((1, 4, 1, 8)), jnp.ones((1, 64, 1, 8))
    return {
        "masked_attention": lambda **k: masked_attention(x, x, x, Visibility.causal(1, 4), **k),
        "linear_log_prob": lambda **k: linear_log_prob(x[0, :, 0], x[0, :, 0], jnp.arange(4), **k),
        "cached_attention": lambda **k: cached_attention(
            chunk, chunk, chunk, lengths=jnp.array([64]), **k
        ),
    }


@pytest.mark.parametrize("op", calls())
def test_every_op_names_what_it_does_not_have(op):
    for name in ("pallas_tpu", "mosaic_gpu", "triton"):
        missing = f"no {name} implementation of {op}|{name}: runs on .* \\(here: cpu\\)"
        with pytest.raises(Unsupported, match=missing):
            calls()[op](implementation=name)
    with pytest.raises(ValueError, match=f"unknown implementation 'dense' of {op}"):
        calls()[op](implementation="dense")
