# SPDX-License-Identifier: Apache-2.0
"""Decoding with drafts against plain generation, and the loop's own bookkeeping."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import generate, sharding, transformer
from lm.config import MeshConfig, SamplingConfig
from lm.cp_heads import decode, draft, head
from lm.cp_heads.drafters import Autoregressive, Heads, Target
from lm.cp_heads.head import HeadConfig
from lm.errors import UserError
from tests.lm.cp_heads import counting

MODEL = counting.MODEL
LONG = SamplingConfig(max_new_tokens=24)
DRAWN = SamplingConfig(temperature=1.0, max_new_tokens=24)
CP = HeadConfig(rank=3, predicted=4, expander="full")
HMM = dataclasses.replace(CP, transition="constant")
LENGTHS = [3, 15, 2, 9, 1, 16, 7, 7]


@functools.cache
def plain(sampling=LONG, stops=()):
    return generate.generate(
        MODEL,
        counting.params_of(),
        counting.prompts_of(LENGTHS),
        sampling,
        stops,
        jax.random.key(0),
    )


def run(drafter=None, sampling=LONG, stops=(), prompts=None, weights=None, seed=0, **kwargs):
    drafter = Heads(CP) if drafter is None else drafter
    if weights is None and isinstance(drafter, Heads):
        weights = counting.head_of(drafter.config)
    prompts = counting.prompts_of(LENGTHS) if prompts is None else prompts
    return decode.decode(
        Target(MODEL, sampling),
        counting.params_of(),
        drafter,
        weights,
        prompts,
        stops,
        jax.random.key(seed),
        **kwargs,
    )


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.stopped == other.stopped
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)


TREE = Heads(HMM, chains=3)
DRAFTERS = {
    "chain": Heads(CP),
    "tree": TREE,
    "nothing": Autoregressive(),
}


@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_greedy_equals_plain_generation(drafter):
    got, statistics = run(drafter)
    assert_same(got, plain())
    assert len({tuple(g.tokens.tolist()) for g in got}) >= 6
    summary = statistics.summary()
    assert summary["tokens"] == 24 * len(LENGTHS)
    if drafter.length:
        assert 1.2 < summary["tokens_per_call"] < 3.9  # drafts are right often, not always
        assert all(0 < share <= 1 for share in summary["acceptance"])
        assert summary["acceptance"][0] < 1
    else:
        assert summary["tokens_per_call"] == 1
        assert summary["trunk_calls"] == 23 * len(LENGTHS)


@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_stop_tokens_and_the_last_place_are_exact(drafter):
    """A cycle emits several tokens, of which the first stop token or the limit takes some away."""
    ended = 0
    for stop in (4, 11):
        got, _ = run(drafter, stops=[stop])
        assert_same(got, plain(stops=(stop,)))
        ended += sum(g.stopped for g in got)
    assert ended >= 4


def test_a_sequence_does_not_depend_on_its_company():
    """Others beside it, in other places: the same draws, since they belong to the index."""
    together, _ = run(TREE, DRAWN)
    prompts = counting.prompts_of(LENGTHS)
    others = counting.prompts_of([5, 2, 12, 16, 3, 4, 1, 9])
    mixed = [others[0], prompts[5], others[1], prompts[0], *others[2:6]]
    again, _ = run(TREE, DRAWN, prompts=mixed, indices=[20, 5, 21, 0, 22, 23, 24, 25])
    assert again[1].tokens.tolist() == together[5].tokens.tolist()
    assert again[3].tokens.tolist() == together[0].tokens.tolist()
    other, _ = run(TREE, DRAWN, seed=1)
    assert other[0].tokens.tolist() != together[0].tokens.tolist()


def test_stream_concatenates_to_decode():
    whole, statistics = run(stops=[4])
    pieces = list(
        decode.stream(
            Target(MODEL, LONG),
            counting.params_of(),
            Heads(CP),
            counting.head_of(CP),
            counting.prompts_of(LENGTHS),
            [4],
            jax.random.key(0),
            chunk=5,
        )
    )
    assert 1 < len(pieces) <= 5
    for index, wanted in enumerate(whole):
        parts = [piece[index] for piece, _ in pieces]
        np.testing.assert_array_equal(np.concatenate([p.tokens for p in parts]), wanted.tokens)
        assert parts[-1].stopped == wanted.stopped
    assert pieces[-1][1].summary() == statistics.summary()


def test_statistics_count_cycles():
    _, statistics = run()
    assert statistics.kept.shape == (len(LENGTHS), 4)
    # a sequence's last cycle may pass the limit, every other token comes from a cycle
    emitted = statistics.kept @ np.arange(1, 5)
    assert np.all((emitted >= 23) & (emitted <= 23 + 3))
    made = decode.Statistics(np.array([[4, 3, 2, 1]]), np.array([20])).summary()
    assert made["trunk_calls"] == 10
    assert made["tokens_per_call"] == pytest.approx(2.0)
    assert made["acceptance"] == pytest.approx([6 / 10, 3 / 6, 1 / 3])
    both = statistics + decode.Statistics(np.array([[4, 3, 2, 1]]), np.array([20]))
    assert both.trunk_calls == statistics.trunk_calls + 10


def test_draft_conditionals_are_those_of_the_joint():
    """Products of conditionals equal the enumerated joint, whatever the transition."""
    model = dataclasses.replace(MODEL, vocab_size=5, embed_dim=8)
    config = HeadConfig(rank=3, predicted=3, transition="linear", noise=1.0)
    params = head.init(jax.random.key(0), config, model)
    rng = np.random.default_rng(0)
    params["transition"]["kernel"] = jnp.asarray(rng.normal(size=(2, 8, 3, 3)), jnp.float32)
    states = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    make = jax.jit(lambda states: draft.factors(params, config, model, states, table))
    factors = make(states)
    w, p, a = (np.exp(np.float64(x)) for x in (factors.log_w, factors.log_p, factors.log_a[:2]))
    joint = np.einsum("bi,bix,bij,bjy,bjk,bkz->bxyz", w, p[0], a[0], p[1], a[1], p[2])
    given = joint / joint.sum(axis=(2, 3), keepdims=True)
    row, last, *drafted = np.indices((2, 5, 5, 5), np.int32).reshape(4, -1)
    every = make(states[row])
    tokens = jnp.stack(drafted, axis=-1)[:, None]
    log_q = jax.jit(draft.conditionals, static_argnums=3)(every, last, tokens, DRAWN)
    steps = jnp.take_along_axis(log_q, tokens[..., None], axis=-1)
    np.testing.assert_allclose(np.exp(steps.sum(axis=(1, 2, 3))), given.ravel(), rtol=1e-4)


@pytest.mark.parametrize("vocab", [0, 7])
def test_factors_are_those_of_the_head(vocab):
    model = dataclasses.replace(MODEL, logit_softcap=3.0)
    config = HeadConfig(rank=2, predicted=3, draft_vocab=vocab, noise=1.0)
    params = head.init(jax.random.key(0), config, model)
    states = jax.random.normal(jax.random.key(1), (2, 16))
    table = transformer.unembedding(MODEL, counting.params_of())
    found = jax.jit(lambda: draft.factors(params, config, model, states, table, 13))()
    for step, got in enumerate(found.log_p):
        wanted = head.log_probs(params, config, states, step, table, softcap=3.0, valid_vocab=13)
        np.testing.assert_allclose(head.scatter(params, got, 16), wanted, atol=1e-5)


def test_unknown_tokens_teach_nothing():
    """The last token may lie outside the draft vocabulary."""
    config = HeadConfig(rank=3, predicted=4, expander="full", draft_vocab=7)
    weights = counting.head_of(config) | {"vocab": {"ids": jnp.array([1, 2, 3, 5, 8, 11, 13])}}
    states = jax.random.normal(jax.random.key(0), (2, 16))
    table = transformer.unembedding(MODEL, counting.params_of())

    @jax.jit
    def beliefs(weights):
        factors = draft.factors(weights, config, MODEL, states, table)
        return factors, draft.first_belief(factors, jnp.array([0, 2]))

    factors, belief = beliefs(weights)
    np.testing.assert_allclose(belief[0], factors.log_w[0], atol=1e-6)
    assert np.abs(belief[1] - factors.log_w[1]).max() > 0.1


def test_four_devices_equal_one():
    split = sharding.make(MeshConfig(data=2, fsdp=1, tensor=2), MODEL)
    params, weights = counting.params_of(), counting.head_of(TREE.config)
    one, counted = run(TREE, DRAWN)
    four, again = decode.decode(
        Target(MODEL, DRAWN, sharding=split),
        jax.device_put(params, split.params(params)),
        TREE,
        jax.device_put(weights, split.named()),
        counting.prompts_of(LENGTHS),
        (),
        jax.random.key(0),
    )
    assert_same(four, one)
    assert again.summary() == counted.summary()


def test_refusals():
    with pytest.raises(UserError, match="no prompts"):
        run(prompts=[])
    with pytest.raises(UserError, match="prompt 1 is empty"):
        run(prompts=[np.array([1], np.int32), np.zeros(0, np.int32)])
    with pytest.raises(UserError, match="1 indices for 2 prompts"):
        run(prompts=counting.prompts_of([2, 3]), indices=[0])
    with pytest.raises(UserError, match="4 draft chains: a head of rank 3"):
        run(Heads(CP, chains=4))
    with pytest.raises(UserError, match=r"head\.rank=0"):
        run(Heads(dataclasses.replace(CP, rank=0)), weights={})
