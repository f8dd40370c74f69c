# SPDX-License-Identifier: Apache-2.0
"""The decode loop under policies: dense where everything is read, and the loop's bookkeeping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import sharding
from lm.config import MeshConfig, SamplingConfig
from lm.errors import UserError
from lm.long_context import decode, lists
from lm.long_context.policy import Dense, Policy, Read
from lm.long_context.program import Program
from lm.token_select.method import TokenSelect
from tests.lm.long_context.small import GREEDY, MODEL, assert_same, dense, params, prompts, run
from tests.lm.token_select.small import SELECT

DRAWN = SamplingConfig(temperature=1.5, top_k=40, top_p=0.95, max_new_tokens=12)
EVERYTHING = dataclasses.replace(SELECT, k=96, shortcut=False)


@pytest.mark.parametrize(
    "policy", [Dense(chunk=8), TokenSelect(EVERYTHING)], ids=["dense", "everything"]
)
def test_reading_everything_is_plain_generation(policy):
    got, statistics = run(policy)
    assert_same(got, dense())
    # 11 steps of each sequence, the first of which reads the prompt and the token drawn from it
    wanted = np.mean([n + 1 + np.arange(11) for n in map(len, prompts())])
    assert statistics.summary(policy) == {"tokens_read": pytest.approx(wanted)}


def test_draws_and_stop_tokens_are_those_of_plain_generation():
    plain = dense(DRAWN)
    stops = tuple(sorted({int(plain[0].tokens[3]), int(plain[2].tokens[5])}))
    got, statistics = run(Dense(chunk=8), DRAWN, stops)
    assert_same(got, dense(DRAWN, stops))
    assert sum(g.stopped for g in got) >= 2
    assert statistics.steps.tolist() == [len(g.tokens) if g.stopped else 11 for g in got]


def test_selecting_reads_what_it_may_and_changes_the_text():
    got, statistics = run(TokenSelect(SELECT))
    assert got[0].tokens.tolist() == dense()[0].tokens.tolist()  # 17 tokens in all: nothing to skip
    assert any((a.tokens != b.tokens).any() for a, b in zip(got, dense(), strict=True))
    np.testing.assert_array_equal(statistics.reads[:, 1:], 11 * SELECT.budget)
    np.testing.assert_array_equal(statistics.reads[:, 0], sum(range(6, 17)))


@pytest.mark.parametrize(("reuse", "branches"), [(0.0, False), (0.9, True)])
def test_a_step_waits_for_no_branch_that_it_does_not_need(reuse, branches):
    """A GPU asks the host at each, once a layer; only a selection that may be reused needs one."""
    program = Program(MODEL, GREEDY, TokenSelect(dataclasses.replace(SELECT, reuse=reuse)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    program, arguments = decode.request(program, prompts(), [1], key)
    state = jax.eval_shape(lambda *a: decode.prefill(program, *a), params(), *arguments)
    loop = decode.advance.lower(program, params(), state, arguments.stop_ids, 5)
    assert ("stablehlo.case" in loop.as_text()) == branches


def test_a_ragged_batch_equals_each_prompt_alone():
    policy = TokenSelect(SELECT)
    together, _ = run(policy, DRAWN)
    for index in (1, 2):
        alone, _ = run(policy, DRAWN, texts=[prompts()[index]], indices=[index])
        assert_same(alone, together[index : index + 1])
    other, _ = run(policy, DRAWN, seed=1)
    assert other[1].tokens.tolist() != together[1].tokens.tolist()


def test_stream_concatenates_to_decode():
    policy = TokenSelect(SELECT)
    whole, statistics = run(policy)
    pieces = list(
        decode.stream(MODEL, params(), prompts(), GREEDY, policy, (), jax.random.key(0), chunk=5)
    )
    assert len(pieces) == 3
    for index, wanted in enumerate(whole):
        parts = [piece[index].tokens for piece, _ in pieces]
        assert [len(part) for part in parts] == [5, 5, 2]
        np.testing.assert_array_equal(np.concatenate(parts), wanted.tokens)
    assert pieces[-1][1].summary(policy) == statistics.summary(policy)


def test_programs_do_not_know_the_lengths_of_prompts():
    policy = TokenSelect(SELECT)
    rng = np.random.default_rng(0)

    def sizes():
        return decode.prefill._cache_size(), decode.advance._cache_size()

    run(policy)
    before = sizes()
    for longest in (34, 49, 64):  # 5, 7 and 8 chunks
        texts = [rng.integers(0, 64, n).astype(np.int32) for n in (longest, 3, 17)]
        got, _ = run(policy, texts=texts)
        assert [len(g.tokens) for g in got] == [12, 12, 12]
    assert sizes() == before


@dataclasses.dataclass(frozen=True)
class Sinks(Policy):
    """A baseline as the seam's documentation writes it, with state to see that it is kept."""

    n_init: int = 2
    n_local: int = 8
    chunk: int = 8

    def start(self, config, batch, capacity):
        return {"calls": jnp.zeros((config.num_layers, batch), jnp.int32)}

    def dims(self):
        return {"calls": ("batch",)}

    def select(self, state, view):
        begin, end = lists.bounds(view.total, self.n_init, self.n_local)
        none = jnp.zeros_like(begin)
        size = self.n_init + self.n_local
        read = Read(*lists.listed(begin, begin[:, None], none, end, view.total, size))
        return read, {"calls": state["calls"] + (view.rows > 0)}

    def statistics(self, state):
        return state

    def summarize(self, found):
        return {"calls": found["calls"].sum(axis=0).tolist()}


def test_another_policy_runs_in_the_same_loop():
    got, statistics = run(Sinks())
    found = statistics.summary(Sinks())
    assert found["tokens_read"] == pytest.approx((3 * 10 + np.mean([6, 7, 8, 9] + 7 * [10])) / 4)
    # per layer: chunks of the prompt, and steps
    assert found["calls"] == [2 * (-(-n // 8) + 11) for n in map(len, prompts())]
    assert any((a.tokens != b.tokens).any() for a, b in zip(got, dense(), strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"reuse": 0.05, "shadow": "int8", "head_weights": (1.0, 0.5, 2.0, 1.5), "coverage": 0.9},
        {"per_kv_head": True, "vote": "hard", "positions": "true"},
    ],
    ids=["shared", "per_kv_head"],
)
def test_four_devices_equal_one(changes):
    split = sharding.make(MeshConfig(data=2, fsdp=1, tensor=2), MODEL)
    policy = TokenSelect(dataclasses.replace(SELECT, **changes))
    weights = jax.device_put(params(), split.params(params()))
    one, counted = run(policy)
    four, again = run(policy, weights=weights, sharding=split)
    assert_same(four, one)
    for a, b in zip(*(jax.tree.leaves(x.summary(policy)) for x in (again, counted)), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_refusals():
    policy = TokenSelect(SELECT)
    with pytest.raises(UserError, match="no prompts"):
        run(policy, texts=[])
    with pytest.raises(UserError, match=r"prompt 1 has 60 tokens and 12 new ones .* of 71"):
        run(policy, capacity=71)
    with pytest.raises(UserError, match=r"a budget of 106 \(.*\) is above the context of 100"):
        run(TokenSelect(EVERYTHING), capacity=100)
    with pytest.raises(UserError, match=r"head_weights has 3 numbers: 4 .* or 8"):
        run(TokenSelect(dataclasses.replace(SELECT, head_weights=(1.0, 1.0, 1.0))))
    split = sharding.make(MeshConfig(data=2, fsdp=1, tensor=2), MODEL)
    with pytest.raises(UserError, match=r"modulo' needs mesh\.tensor=1"):
        run(TokenSelect(dataclasses.replace(SELECT, gqa="modulo")), sharding=split)
