# SPDX-License-Identifier: Apache-2.0
"""Threads that read what a policy picks of a prompt see that and all of the answer, and nothing is
lost where everything is picked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.async_decoding import pool
from lm.async_decoding.selected import Apart, Reading, Selected
from lm.async_decoding.threads import Feed
from lm.errors import UserError
from lm.long_context.cache import Buffers
from lm.long_context.guard import Guard
from lm.long_context.policy import Policy, Read
from lm.token_select.config import SelectConfig
from lm.token_select.method import TokenSelect
from tests.lm.async_decoding.composed_programs import (
    MODEL,
    PROMPT,
    Run,
    answer,
    check_logits,
    without,
)


@dataclasses.dataclass(frozen=True)
class Odd(Policy):
    """Every other token of the prompt, when the answer reads it."""

    chunk: int = 8

    def select(self, state, view):
        if view.prefill:
            return None, state
        slots = 2 * jnp.arange(view.capacity // 2, dtype=jnp.int32)[None] + 1
        return Read(jnp.broadcast_to(slots, (len(view.rows), slots.shape[1])), view.total // 2), {}


def test_threads_see_what_is_picked():
    program = answer()
    run = Run.begun(Selected(Odd()), [program])
    assert run.state.threads.slots.tolist() == [0]  # the pool is the answer's alone
    check_logits(run, program, without(program, range(0, len(PROMPT), 2)))


def test_a_budget_that_covers_the_prompt_loses_nothing():
    program = answer()
    select = SelectConfig(2, 6, 16, chunk=4, rope="write", positions="true", shortcut=False)
    run = Run.begun(Selected(TokenSelect(select)), [program])
    check_logits(run, program, without(program, ()))


def test_a_step_picks_by_the_mean_of_its_rows():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Recording(Policy):
        def select(self, state, view):
            seen.append(view)
            return None, state

    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
    k = jnp.zeros((2, 2, 8, 2, 8))
    lengths = jnp.array([5, 7], jnp.int32)
    owners = jnp.array([[0, -1, 2], [-1, -1, -1]], jnp.int32)
    rows = Feed(*(owners if name == "threads" else jnp.zeros((2, 3), jnp.int32)
                  for name in (f.name for f in dataclasses.fields(Feed))))  # fmt: skip
    held = Apart(Buffers(k, k), {}, lengths, pool.Pool(k, k, jnp.zeros((2, 8), jnp.int32)))
    context = Reading(held, rows, jnp.zeros(2, jnp.int32), MODEL, Recording())
    read, _ = context._picked({}, jnp.int32(0), jnp.asarray(q))
    (view,) = seen
    np.testing.assert_allclose(view.q[0, 0], (q[0, 0] + q[0, 2]) / 2, rtol=1e-6)
    assert view.rows.tolist() == [1, 0]
    assert int(view.total[0]) == 5
    assert jax.tree.map(lambda x: x.tolist(), read) == Read([list(range(8))] * 2, [5, 7])


def test_what_threads_cannot_read_is_refused():
    with pytest.raises(UserError, match="several positions"):
        Selected(TokenSelect(SelectConfig()))

    @dataclasses.dataclass(frozen=True)
    class Guarded(Policy):
        guard = Guard(2, False)

    with pytest.raises(UserError, match="dense steps"):
        Selected(Guarded())
