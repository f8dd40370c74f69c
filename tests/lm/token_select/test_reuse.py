# SPDX-License-Identifier: Apache-2.0
"""The Selection Cache step by step: what is reused, for how long, and that it costs no scoring."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.long_context.cache import Buffers
from lm.long_context.heads import Heads
from lm.long_context.policy import View
from lm.token_select import select
from lm.token_select.method import TokenSelect
from tests.lm.long_context.small import MODEL
from tests.lm.token_select.small import SELECT

CONFIG = dataclasses.replace(SELECT, reuse=0.9, rope="write", positions="true")
POLICY = TokenSelect(CONFIG)
N, K, H = 4, 2, 8


class Layer:
    """One layer's policy fed with queries of our choice; a call of `step` is a decode step, or a
    chunk of one token."""

    def __init__(self, monkeypatch, policy=POLICY, prefill=False):
        rng = np.random.default_rng(0)
        self.k = rng.normal(size=(1, 2, 64, K, H)).astype(np.float32)
        self.policy, self.prefill, self.scored = policy, prefill, 0
        self.state = {k: x[0] for k, x in policy.start(MODEL, 2, 64).items()}
        choose = select.choose

        def counted(*arguments, **options):
            jax.debug.callback(self._count, ordered=False)
            return choose(*arguments, **options)

        monkeypatch.setattr(select, "choose", counted)
        self.call = jax.jit(self._call)

    def _count(self):
        self.scored += 1

    def _call(self, state, q, total, active):
        buffers = Buffers(jnp.asarray(self.k), jnp.asarray(self.k))
        view = View(
            MODEL, buffers, jnp.int32(0), q[:, None], total - active, active,
            Heads((), None), self.prefill, None,
        )  # fmt: skip
        return self.policy.select(state, view)

    def step(self, q, total, active=(1, 1)):
        """The slots that both sequences read, and whether anything was scored."""
        before = self.scored
        total, active = (np.array(x, np.int32) for x in (total, active))
        read, self.state = self.call(self.state, np.float32(q), total, active)
        jax.effects_barrier()
        lists = zip(read.slots.tolist(), read.counts, strict=True)
        return [slots[:n] for slots, n in lists], self.scored - before


def best(layer, b, q, total):
    """The exact selection at `total`."""
    keys = np.repeat(layer.k[0, b], N // K, axis=1)  # [S, N, H]
    logits = np.einsum("nh,snh->ns", q[b], keys[2 : total - 8])
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    votes = (e / e.sum(axis=1, keepdims=True)).sum(axis=0)
    return sorted(2 + np.argsort(-votes)[:8])


def test_selections_are_kept_while_queries_stay_alike(monkeypatch):
    layer = Layer(monkeypatch)
    rng = np.random.default_rng(1)
    q = rng.normal(size=(2, N, H))
    totals = np.array([30, 41])
    read, scored = layer.step(q, totals)
    first = [best(layer, b, q, totals[b]) for b in range(2)]
    assert read == [[0, 1, *first[b], *range(t - 8, t)] for b, t in enumerate(totals)]
    assert scored == 1

    # alike: the same tokens, and those that left the window; nothing is scored
    near = q + 0.1 * rng.normal(size=q.shape)
    read, scored = layer.step(near, totals + 1)
    assert read == [[0, 1, *first[b], *range(t - 8, t + 1)] for b, t in enumerate(totals)]
    assert scored == 0

    # sequence 1 turns away: it is scored alone, sequence 0 keeps what it has
    turned = np.stack([q[0], rng.normal(size=(N, H))])
    read, scored = layer.step(turned, totals + 2)
    assert scored == 1
    assert read[0] == [0, 1, *first[0], *range(30 - 8, 32)]
    second = best(layer, 1, turned, 43)
    assert read[1] == [0, 1, *second, *range(43 - 8, 43)]

    # n_local / 4 = 2 reuses are the most, however alike
    read, scored = layer.step(turned, totals + 3)
    assert scored == 1
    assert read[0] == [0, 1, *best(layer, 0, turned, 33), *range(33 - 8, 33)]
    assert read[1] == [0, 1, *second, *range(43 - 8, 44)]

    found = {k: np.asarray(x)[None] for k, x in POLICY.statistics(layer.state).items()}
    summary = POLICY.summarize(found)
    assert summary["reuse_rate"] == (2 + 2) / 8
    cosines = [
        np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in [
            (near[0], q[0]), (near[1], q[1]), (turned[0], q[0]), (turned[1], q[1]),
            (turned[0], q[0]), (turned[1], turned[1]),
        ]
    ]  # fmt: skip
    np.testing.assert_allclose(summary["query_similarity"], np.mean(cosines), rtol=1e-5)


def test_no_slot_is_read_twice_before_there_are_n_init_tokens(monkeypatch):
    """What a selection found of a short context grows into the first tokens."""
    layer = Layer(monkeypatch, TokenSelect(dataclasses.replace(CONFIG, n_init=16)))
    q = np.random.default_rng(1).normal(size=(2, N, H))
    for grown in range(3):
        read, scored = layer.step(q, [10 + grown, 15 + grown])
        assert read == [list(range(10 + grown)), list(range(15 + grown))]
        assert scored == 0
    assert np.asarray(layer.state["hits"]).tolist() == [2, 2]


def test_a_sequence_that_is_done_neither_scores_nor_changes(monkeypatch):
    layer = Layer(monkeypatch)
    q = np.random.default_rng(1).normal(size=(2, N, H))
    layer.step(q, [30, 41])
    before = jax.device_get(layer.state)
    _, scored = layer.step(np.stack([q[0], -q[1]]), [31, 41], active=(1, 0))
    assert scored == 0
    after = jax.device_get(layer.state)
    for name in before:
        np.testing.assert_array_equal(before[name][1], after[name][1])


@pytest.mark.parametrize(
    ("prefill", "reuse"), [(True, 0.0), (False, 0.9), (False, 0.0)], ids=["chunk", "reuse", "step"]
)
def test_nothing_is_scored_where_everything_is_picked(monkeypatch, prefill, reuse):
    """Unless that needs a branch of its own: a step scores in any case, and picks as much."""
    policy = TokenSelect(dataclasses.replace(CONFIG, reuse=reuse))
    layer = Layer(monkeypatch, policy, prefill)
    q = np.random.default_rng(1).normal(size=(2, N, H))
    read, scored = layer.step(q, [18, 11])
    assert scored == (not prefill and not reuse)
    assert read == [list(range(18)), list(range(11))]
    assert layer.step(-q, [19, 11])[1] == 1  # one more, and nothing to reuse
