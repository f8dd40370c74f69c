# SPDX-License-Identifier: Apache-2.0
"""A filled cache beside one that a prompt filled, and how many layers fit."""

import dataclasses

import jax
import numpy as np
import pytest

from lm.config import SamplingConfig
from lm.errors import UserError
from lm.long_context import benchmark, decode
from lm.long_context.program import Program
from lm.token_select.method import TokenSelect
from lm.token_select.methods import Methods
from tests.lm.long_context.small import MODEL, params, prompts
from tests.lm.token_select.small import SELECT


def test_a_filled_cache_is_like_a_prompt_s():
    """The same arrays, every slot of it written, and decoding goes on from it."""
    select = dataclasses.replace(SELECT, shadow="int8")
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=4)
    program = Program(MODEL, sampling, TokenSelect(select))
    program, arguments = decode.request(program, prompts()[1:3], (), jax.random.key(0), 80)
    wanted = jax.eval_shape(lambda *a: decode.prefill(program, *a), params(), *arguments)
    state = benchmark.filled(program, params(), *arguments)
    for got, shape in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert (got.shape, got.dtype) == (shape.shape, shape.dtype)
    k, v, codes, scales = (np.asarray(x) for x in state.cache.buffers)
    assert k.std() == pytest.approx(1, rel=0.02)
    assert np.abs(np.corrcoef(k.ravel(), v.ravel())[0, 1]) < 0.02
    assert len(np.unique(k[:, :, 0, 0, 0])) == 4  # every layer and sequence has its own
    assert np.abs(codes * scales[..., None] - k).max() <= scales.max() * 0.51
    assert state.last.tolist() == [prompts()[1][-1], prompts()[2][-1]]
    state = decode.advance(program, params(), state, arguments.stop_ids, 4)
    assert state.counts.tolist() == [4, 4]
    assert state.cache.lengths.tolist() == [63, 36]


def test_layers_that_fit_is_what_the_arrays_take():
    model = dataclasses.replace(MODEL, num_layers=6)
    tokens = 1000
    made = jax.tree.leaves(benchmark.random_params(dataclasses.replace(model, num_layers=3), 0))
    caches = 3 * 2 * tokens * model.num_kv_heads * model.head_dim * 4
    needed = (sum(x.nbytes for x in made) + caches) / (1 - benchmark.SLACK)
    assert benchmark.layers_that_fit(model, "", tokens, int(needed) + 2) == 3
    assert benchmark.layers_that_fit(model, "", tokens, int(0.99 * needed)) == 2
    assert benchmark.layers_that_fit(model, "", tokens, 10**12) == 6
    with pytest.raises(UserError, match="not one layer fits"):
        benchmark.layers_that_fit(model, "", tokens, 10**4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"contexts": (40, 17)}, "a budget of 18 tokens is above the context of 17"),
        ({"contexts": (40,), "budget": 41}, "a budget of 41 tokens is above the context of 40"),
        ({"budget": 0}, "--budget=0 must be at least 1"),
        ({"methods": ("h2o",), "filled": True}, "h2o learns from the prompt"),
        ({"methods": ("sparse",)}, "unknown method 'sparse'"),
        ({"batch_sizes": (0,)}, "--batch_sizes=0 must be"),
    ],
)
def test_what_cannot_be_timed_is_refused(options, reason):
    with pytest.raises(UserError, match=reason):
        benchmark.Options(**options).policies(MODEL, Methods(SELECT))


def test_policies_that_start_from_nothing_can_be_timed_on_a_filled_cache():
    names = ("dense", "token_select", "streaming_llm", "random")
    options = benchmark.Options(methods=names, filled=True)
    select = dataclasses.replace(SELECT, reuse=0.9)
    assert tuple(options.policies(MODEL, Methods(select))) == names
