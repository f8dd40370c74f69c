# SPDX-License-Identifier: Apache-2.0
"""gathered_attention: the reference against loops, every implementation against the reference."""

from functools import cache

import jax.numpy as jnp
import pytest

from ops import _gathered_attention_xla
from ops.cached_attention import cached_attention
from ops.gathered_attention import gathered_attention
from tests.ops.op_cases import arrays, jit
from tests.ops.op_tolerances import assert_close

IMPLEMENTATIONS = ("xla",)  # those compared with the reference


def run(implementation, block, monkeypatch, arguments, **settings):
    size = lambda rows, entries: min(block, entries)  # noqa: E731
    monkeypatch.setattr(_gathered_attention_xla, "block_size", size)
    return compiled(implementation, block, tuple(settings.items()))(arguments)


@cache
def compiled(implementation, block, settings):
    """`block` only separates the entries."""
    settings = {"implementation": implementation, "return_lse": True, **dict(settings)}
    return jit(lambda arguments: gathered_attention(**arguments, **settings))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("T", [1, 4])
def test_listing_everything_is_attention_over_the_cache(implementation, T, monkeypatch):
    B, S, N, K, H = 3, 21, 4, 2, 8
    q, k, v = arrays(0, (B, T, N, H), (B, S, K, H), (B, S, K, H))
    lengths = jnp.array([21, 13, 2], jnp.int32)
    expected = cached_attention(
        q, k, v, lengths=lengths, return_lse=True, implementation="reference"
    )
    indices = jnp.broadcast_to(jnp.arange(S), (B, S))
    arguments = {"q": q, "k": k, "v": v, "indices": indices, "counts": lengths, "lengths": lengths}
    actual = run(implementation, 8, monkeypatch, arguments)
    assert_close(actual, expected, "float32")
