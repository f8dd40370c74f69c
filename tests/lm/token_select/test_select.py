# SPDX-License-Identifier: Apache-2.0
"""The parts of a selection: lists, pooling, coverage, votes of identical heads, the shadow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.long_context import cache, lists
from lm.long_context.cache import Buffers
from lm.long_context.heads import Heads
from lm.token_select import select
from lm.token_select.config import SelectConfig

ALL = Heads((), None)
bounds, listed = (
    jax.jit(f, static_argnums=n) for f, n in ((lists.bounds, (1, 2)), (lists.listed, 5))
)


def chosen(config, query, k, total):
    """The picks of one layer of raw keys [B, S, K, H]."""
    buffers = Buffers(k[None], k[None])
    if config.shadow:
        codes = cache.shadow(k[None], cache.SHADOWS[config.shadow])
        buffers = Buffers(k[None], k[None], *codes)

    @jax.jit
    def run(query, buffers, total):
        ends = lists.bounds(total, config.n_init, config.n_local)
        return select.choose(config, query, buffers, jnp.int32(0), *ends, scale=1.0, heads=ALL)

    return jax.device_get(run(query, buffers, jnp.asarray(total, jnp.int32)))


def test_lists_are_init_top_and_tail():
    totals = np.arange(40, dtype=np.int32)
    begins, ends = (np.asarray(x) for x in bounds(totals, 3, 5))
    np.testing.assert_array_equal(begins, np.minimum(3, totals))
    np.testing.assert_array_equal(totals - ends, np.clip(totals - 3, 0, 5))
    cases, tops = [], []
    for total, begin, end in zip(totals, begins, ends, strict=True):
        for tail in range(max(begin, end - 2), end + 1):  # tokens may have left the window
            cases.append((begin, tail, total))
            tops.append(list(range(begin, tail))[::3][:4])
    begin, tail, total = np.array(cases, np.int32).T
    top = np.array([[*x, *[99] * (4 - len(x))] for x in tops])
    counts = np.array([len(x) for x in tops])
    slots, count = listed(begin, top, counts, tail, total, 14)
    both = [np.repeat(x[:, None], 2, axis=1) for x in (top, counts)]
    many, each = listed(begin, *both, tail, total, 14)
    for number, (first, last, n) in enumerate(cases):
        wanted = [*range(first), *tops[number], *range(last, n)]
        assert slots[number, : count[number]].tolist() == wanted
        assert many[number, 1, : each[number, 1]].tolist() == wanted


@pytest.mark.parametrize("vote", ["soft", "raw", "hard"])
def test_identical_heads_are_a_single_head(vote):
    """Then the vote is a monotone function of one head's products."""
    rng = np.random.default_rng(0)
    query, k = rng.normal(size=(1, 1, 8)), rng.normal(size=(1, 60, 1, 8))
    config = SelectConfig(n_init=2, n_local=8, k=7, chunk=8, vote=vote)
    many = np.repeat(query, 4, axis=1).astype(np.float32)
    keys = np.repeat(k, 2, axis=2).astype(np.float32)
    top = chosen(config, many, keys, [60])
    products = k[0, :, 0] @ query[0, 0]
    best = 2 + np.argsort(-products[2:52])[:7]
    assert top.indices[0].tolist() == sorted(best)


@pytest.mark.parametrize("kernel", range(7))
def test_pooling_keeps_the_length(kernel):
    votes = np.random.default_rng(kernel).normal(size=(2, 12)).astype(np.float32)
    begin, end = np.array([0, 3]), np.array([12, 9])
    got = np.asarray(lists.pool(jnp.asarray(votes), kernel, jnp.asarray(begin), jnp.asarray(end)))
    for b in range(2):
        for t in range(begin[b], end[b]):
            low, high = t - max(kernel - 1, 0) // 2, t + kernel // 2
            window = votes[b, max(low, begin[b]) : min(high + 1, end[b])]
            assert got[b, t] == window.max()


def test_coverage_stops_at_its_share():
    votes = np.array([[0.1, 0.4, 0.05, 0.3, 0.0, 0.0]], np.float32)
    top = select.Top(jnp.array([[3, 5, 8, 9, 99, 99]]), jnp.array([4]), jnp.asarray(votes))
    for share, wanted in ((0.3, [5]), (0.41, [5, 9]), (0.7, [5, 9]), (0.75, [3, 5, 9])):
        got = select.covering(top, top.votes, share, jnp.float32(1.0))
        assert got.indices[0, : got.counts[0]].tolist() == wanted
        kept = [3, 5, 8, 9].index
        np.testing.assert_allclose(
            got.votes[0], np.pad(votes[0, [kept(t) for t in wanted]], (0, 6 - len(wanted)))
        )
    got = select.covering(top, top.votes, 1.0, jnp.float32(1.0))  # not all of it was picked
    assert got.counts.tolist() == [4]
    empty = top._replace(counts=jnp.array([0]), votes=0 * top.votes)
    assert select.covering(empty, empty.votes, 0.5, jnp.float32(1.0)).counts.tolist() == [0]


@pytest.mark.parametrize(
    ("shadow", "pooled", "least"), [("int8", 0, 0.99), ("fp8", 0, 0.97), ("int8", 5, 0.97)]
)
def test_a_rescored_shadow_picks_what_the_keys_pick(shadow, pooled, least):
    """On Gaussian keys; codes of 8 bits alone miss more."""
    rng = np.random.default_rng(0)
    k = rng.normal(size=(2, 2048, 2, 64)).astype(np.float32)
    query = 0.4 * rng.normal(size=(2, 4, 64)).astype(np.float32)
    exact = SelectConfig(n_init=4, n_local=64, k=256, chunk=64, pool=pooled)
    by_codes = dataclasses.replace(exact, shadow=shadow)
    wanted = chosen(exact, query, k, [2048, 1500])
    got = chosen(by_codes, query, k, [2048, 1500])
    alone = chosen(dataclasses.replace(by_codes, rescore=1.0), query, k, [2048, 1500])

    def overlap(other):
        pairs = zip(other.indices, wanted.indices, strict=True)
        return min(len(np.intersect1d(a, b)) / 256 for a, b in pairs)

    assert overlap(got) >= least
    assert overlap(alone) > 0.9
    if pooled:
        return  # neighbours share a vote: one that falls the other way takes them with it
    assert overlap(alone) < overlap(got)
    same = got.indices == wanted.indices
    off = np.abs(got.votes[same] / wanted.votes[same] - 1)
    assert off.max() < (0.05 if shadow == "int8" else 0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 513}, "chunk=513 is larger than select.n_local=512"),
        ({"positions": "packed", "rope": "write"}, "needs select.rope='read'"),
        ({"per_kv_head": True, "gqa": "modulo"}, "needs select.gqa='grouped'"),
        ({"coverage": 0.5, "vote": "raw"}, "coverage needs select.vote='soft'"),
        ({"reuse": 1.5}, "reuse=1.5 must be in"),
        ({"reuse_prefill": True}, "needs select.reuse above 0"),
        ({"reuse_prefill": True, "reuse": 0.9}, "chunk=512 to be at most select.n_local / 4 = 128"),
        ({"rescore": 0.9}, "rescore=0.9 must be at least 1"),
        ({"head_weights": (1.0, -1.0)}, "-1.0 is not a number >= 0"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"n_init": -1}, "n_init=-1 must not be negative"),
        ({"shadow": "int4"}, "'int4' is not one of , int8, fp8"),
    ],
)
def test_settings_that_cannot_be_served(changes, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as caught:
        dataclasses.replace(SelectConfig(), **changes)
    assert "\n" not in str(caught.value)


def test_a_chunk_that_reads_everything_may_exceed_the_window():
    assert SelectConfig(chunk=513, prefill="dense").chunk == 513
