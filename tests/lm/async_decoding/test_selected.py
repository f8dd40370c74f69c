# SPDX-License-Identifier: Apache-2.0
"""Threads that read what a policy picks of a prompt see that and all of the answer, and nothing is
lost where everything is picked."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.async_decoding.pool import Pool
from lm.async_decoding.selected import Apart, Reading, Selected
from lm.async_decoding.threads import Feed
from lm.errors import UserError
from lm.long_context.cache import Buffers
from lm.long_context.guard import Guard
from lm.long_context.policy import Policy
from lm.token_select.config import SelectConfig
from lm.token_select.method import TokenSelect
from tests.lm.async_decoding.composed_programs import (
    MODEL,
    Run,
    answer,
    check_logits,
    without,
)


def test_a_budget_that_covers_the_prompt_loses_nothing():
    program = answer()
    select = SelectConfig(2, 6, 16, chunk=4, rope="write", positions="true", shortcut=False,
                          prefill="dense")  # fmt: skip
    run = Run.begun(Selected(TokenSelect(select)), [program])
    check_logits(run, program, without(program, ()))


def test_a_step_picks_by_the_mean_of_its_rows():
    """Against numpy: three rows of two requests, of which one stands still in the second."""
    rng = np.random.default_rng(0)
    B, T, S, P, N, K, H = 2, 3, 6, 9, 4, 2, 8
    draw = functools.partial(rng.normal, size=(B, T, N, H))
    q, k, v = draw(), draw()[:, :, :K], draw()[:, :, :K]
    prompt, held = (rng.normal(size=(2, 2, B, n, K, H)).astype(np.float32) for n in (16, S))
    lengths = np.array([P, P - 2])
    threads = np.array([[0, 1, 2], [0, -1, 1]])
    rows = Feed(
        tokens=jnp.zeros((B, T), jnp.int32),
        positions=jnp.zeros((B, T), jnp.int32),
        threads=jnp.asarray(threads),
        joined=jnp.array([[1, 0, 0], [0, -1, 0]]),
        forks=jnp.array([[99, 2, 2], [99, 0, 3]]),
        slots=jnp.array([[3, 4, 5], [4, 99, 5]]),
    )
    owners = np.array([[0, 0, 1, 0, 1, 2], [0, 0, 0, 1, 0, 1]])
    select = SelectConfig(1, 2, 2, chunk=2, rope="write", positions="true", scale_scores=True)
    pool = Pool(*map(jnp.asarray, held), jnp.asarray(owners))
    apart = Apart(Buffers(*map(jnp.asarray, prompt)), {}, jnp.asarray(lengths), pool)
    context = Reading(apart, rows, jnp.full(B, S), MODEL, TokenSelect(select))
    new = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    out, (keys, _, _) = jax.jit(context.attend)(context.state, jnp.int32(1), *new)
    np.testing.assert_allclose(keys[1, 0, 5], k[0, 2], rtol=1e-6)
    for b, t in np.argwhere(threads >= 0).tolist():
        mean = q[b][threads[b] >= 0].mean(axis=0)
        own = owners[b] == threads[b, t]
        sees = own | ((owners[b] <= rows.joined[b, t]) & (np.arange(S) < rows.forks[b, t]))
        answered = held[:, 1, b].copy()
        for row in np.flatnonzero(threads[b] >= 0):
            answered[:, rows.slots[b, row]] = k[b, row], v[b, row]
        end = int(lengths[b]) - 2
        votes = np.zeros(end)
        for head in range(N):
            products = prompt[0, 1, b, :end, head // 2] @ mean[head] / H**0.5
            shares = np.exp(products[1:] - products[1:].max())
            votes[1:] += shares / shares.sum()
        best = 1 + np.argsort(-votes[1:])[:2]
        picked = sorted([0, *best.tolist(), end, end + 1])
        for head in range(N):
            both = [np.concatenate([prompt[i, 1, b, picked, head // 2],
                                    answered[i, sees, head // 2]]) for i in (0, 1)]  # fmt: skip
            scores = both[0] @ q[b, t, head] / H**0.5
            weights = np.exp(scores - scores.max())
            expected = weights @ both[1] / weights.sum()
            np.testing.assert_allclose(out[b, t, head], expected, rtol=0, atol=1e-5)


def test_what_threads_cannot_read_is_refused():
    with pytest.raises(UserError, match="several positions"):
        Selected(TokenSelect(SelectConfig()))

    @dataclasses.dataclass(frozen=True)
    class Guarded(Policy):
        guard = Guard(2, False)

    with pytest.raises(UserError, match="dense steps"):
        Selected(Guarded())
