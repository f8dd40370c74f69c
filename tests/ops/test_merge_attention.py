# SPDX-License-Identifier: Apache-2.0
"""merge_attention: attention over parts of the keys equals attention over all of them."""

import dataclasses
import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.masked_attention import masked_attention
from ops.merge_attention import merge_attention
from tests.ops.op_cases import arrays, jit, visibility
from tests.ops.op_tolerances import assert_close


def attend(q, k, v, mask, implementation):
    return masked_attention(q, k, v, mask, return_lse=True, implementation=implementation)


def split_attend(q, k, v, mask, cuts, implementation):
    """One call per run of keys; a key j of a part that begins at `start` has index j - start
    there."""
    parts = []
    for start, stop in itertools.pairwise(cuts):
        part = dataclasses.replace(
            mask,
            until=mask.until[:, start:stop] - start,
            hidden_from=mask.hidden_from[:, start:stop] - start,
            hidden_until=mask.hidden_until[:, start:stop] - start,
            row_offset=mask.row_offset - start,
        )
        parts.append(attend(q, k[:, start:stop], v[:, start:stop], part, implementation))
    return merge_attention(parts)


@cache
def outputs_and_gradients(implementation, cuts):
    """Outputs, log-sum-exps and every gradient through both, merged from parts unless cuts is
    None."""

    def value(q, k, v, mask):
        if cuts is None:
            out, lse = attend(q, k, v, mask, implementation)
        else:
            out, lse = split_attend(q, k, v, mask, cuts, implementation)
        finite = jnp.where(lse > -jnp.inf, jnp.sin(lse), 0.0)
        return jnp.sum(jnp.cos(out)) + jnp.sum(finite), (out, lse)

    return jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("mask", ["random", "blind"])
def test_merged_parts_equal_the_whole(implementation, mask):
    q, k, v = arrays(0, (2, 12, 4, 8), (2, 12, 2, 8), (2, 12, 2, 8))
    mask = visibility(mask, 2, 12)
    whole = outputs_and_gradients("reference", None)(q, k, v, mask)
    merged = outputs_and_gradients(implementation, (0, 5, 12))(q, k, v, mask)
    assert_close(merged, whole, "float32")


def test_parts_that_saw_nothing():
    out = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    nothing = (jnp.full((2, 2), 7.0), jnp.full((2,), -jnp.inf))
    merge = jit(merge_attention)
    merged, lse = merge([(out, jnp.array([0.5, -jnp.inf])), nothing])
    np.testing.assert_array_equal(merged, [[1.0, 2.0], [0.0, 0.0]])
    np.testing.assert_array_equal(lse, [0.5, -np.inf])
    gradient = jit(jax.grad(lambda n: merge_attention([(out, n), nothing])[0].sum()))(lse)
    assert np.isfinite(gradient).all()


def test_result_types_follow_the_parts():
    part = (jnp.ones((3, 2), jnp.bfloat16), jnp.full((3,), 1000.0))
    out, lse = jit(merge_attention)([part, part])
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(lse, 1000.0 + np.log(2.0), rtol=1e-6)


def test_nonsense_is_refused():
    part = (jnp.zeros((3, 2)), jnp.zeros(3))
    with pytest.raises(ValueError, match="at least one part"):
        merge_attention([])
    for other in (
        (jnp.zeros((4, 2)), jnp.zeros(4)),
        (jnp.zeros((3, 2), jnp.bfloat16), jnp.zeros(3)),
        (jnp.zeros((3, 2)), jnp.zeros((3, 2))),
    ):
        with pytest.raises(ValueError, match="parts must all be"):
            merge_attention([part, other])
    with pytest.raises(ValueError, match="parts must all be"):
        merge_attention([(jnp.zeros((3, 2)), jnp.zeros((3, 2)))])
