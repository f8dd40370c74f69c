# SPDX-License-Identifier: Apache-2.0
"""Other drafters are lossless too, and a benchmark counts what the loop did."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import losses, transformer
from lm.config import SamplingConfig
from lm.cp_heads import baselines, benchmark, decode, head
from lm.cp_heads.baselines import DraftModel, Hydra
from lm.cp_heads.drafters import Autoregressive, Heads, Target
from lm.cp_heads.head import HeadConfig
from lm.errors import UserError
from tests.lm.cp_heads import counting, test_decode, test_law

SMALLER = dataclasses.replace(counting.MODEL, num_layers=1, mlp_dim=8)
HYDRA = Hydra(predicted=4, width=8)


def hydra_weights(hydra=HYDRA, model=counting.MODEL):
    """Of random weights, so that drafts are rarely right."""
    weights = baselines.init_hydra(jax.random.key(0), hydra, model)
    return jax.tree.map(lambda x: 0.5 * x, weights)


@pytest.mark.parametrize("kind", ["hydra", "draft_model"])
def test_greedy_equals_plain_generation(kind):
    if kind == "hydra":
        drafter, weights = HYDRA, hydra_weights()
    else:
        drafter, weights = DraftModel(SMALLER, 3), counting.params_of(SMALLER)
    got, statistics = test_decode.run(drafter, weights=weights, stops=[4])
    test_decode.assert_same(got, test_decode.plain(stops=(4,)))
    if kind == "draft_model":
        assert statistics.summary()["tokens_per_call"] > 1.5


def test_the_target_as_its_own_draft_model_is_never_refused():
    """Whole drafts are kept, so the key that is fed again would show if it were wrong."""
    drafter = DraftModel(counting.MODEL, 2)
    got, statistics = test_decode.run(drafter, weights=counting.params_of())
    test_decode.assert_same(got, test_decode.plain())
    assert statistics.summary()["acceptance"] == [1.0, 1.0]


def test_draws_with_a_draft_model_have_the_targets_law():
    count = 4096
    smaller = dataclasses.replace(test_law.MODEL, mlp_dim=4)
    rng = np.random.default_rng(5)
    weights = jax.tree.map(
        lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32),
        transformer.abstract(smaller)[1],
    )
    got, _ = decode.decode(
        Target(test_law.MODEL, test_law.PLAIN),
        test_law.params(),
        DraftModel(smaller, 2),
        weights,
        [test_law.PROMPT] * count,
        (),
        jax.random.key(3),
    )
    strings = np.bincount(
        np.stack([g.tokens for g in got]) @ 3 ** np.arange(3, -1, -1), minlength=81
    )
    expected = count * test_law.wanted(test_law.PLAIN, 4).ravel()
    chi2 = np.sum((strings - expected) ** 2 / expected)
    assert chi2 < 80 + 4 * np.sqrt(2 * 80)


def test_hydra_learns_from_the_tokens_before():
    """The loss is the cross entropy of each draft given the true prefix."""
    model = dataclasses.replace(counting.MODEL, num_layers=1)
    params = counting.params_of(model)
    weights = hydra_weights(model=model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 16, (1, 8)).astype(np.int32)
    targets = np.stack([np.roll(tokens[0], -s) for s in range(1, 5)], axis=-1)[None]
    targets[:, 4:] = -1
    batch = {
        "tokens": tokens,
        "positions": np.arange(8, dtype=np.int32)[None],
        "until": np.full((1, 8), 8, np.int32),
        "future_rows": np.arange(8, dtype=np.int32)[None],
        "future_targets": targets,
        "future_children": np.full_like(targets, -1),
        "future_weights": (targets[..., 0] >= 0).astype(np.float32),
    }
    objective = baselines.hydra_objective(HYDRA, model, losses.Execution())

    def loss(weights):
        total, sums = objective({"params": params, "hydra": weights}, batch, None)
        return -total, sums

    (value, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
    assert float(sums["weight"]) == 4
    assert float(value) == pytest.approx(float(sums["head_nll"].sum()), rel=1e-5)
    states = losses.forward(model, params, batch, losses.Execution())
    embedded = params["embed"]["table"][tokens[0]]
    embedded = embedded / np.sqrt(np.mean(np.square(embedded), -1, keepdims=True) + 1e-6)
    wanted = 0.0
    for row in range(4):
        for step in range(1, 4):
            x = np.concatenate([states[0, row], *embedded[row + 1 : row + 1 + step]])
            own = weights[str(step)]
            z = states[0, row] + jax.nn.silu(x @ own["down"]) @ own["up"]
            logits = transformer.logits(model, params, z)
            wanted -= float(jax.nn.log_softmax(logits)[targets[0, row, step]])
    assert float(value) == pytest.approx(wanted, rel=1e-4)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_a_hydra_head_of_equal_size():
    config = HeadConfig(rank=4, predicted=4, expander_rank=16)
    made = head.init(jax.random.key(0), config, counting.MODEL)
    size = sum(x.size for x in jax.tree.leaves(made))
    hydra = Hydra(4, baselines.hydra_width(config, counting.MODEL, size))
    own = baselines.init_hydra(jax.random.key(0), hydra, counting.MODEL)
    assert 0.9 * size < sum(x.size for x in jax.tree.leaves(own)) <= size


def test_refusals():
    other = dataclasses.replace(SMALLER, vocab_size=20)
    with pytest.raises(UserError, match="has 20 tokens, the target 16"):
        test_decode.run(DraftModel(other, 2), weights={})
    with pytest.raises(UserError, match="drafts 0 tokens"):
        test_decode.run(DraftModel(SMALLER, 0), weights={})
    with pytest.raises(UserError, match="--new_tokens=1"):
        benchmark.Options(new_tokens=1)
    with pytest.raises(UserError, match="--batches=0"):
        benchmark.Options(batches=(0,))


def test_benchmark_rows():
    config = test_decode.CP
    methods = [
        benchmark.Method("autoregressive", Autoregressive(), {}),
        benchmark.Method("cp", Heads(config), counting.head_of(config), {"rank": 3}),
        benchmark.Method("hydra", Hydra(2, 4), hydra_weights(Hydra(2, 4))),
        benchmark.Method("draft_model", DraftModel(SMALLER, 1), counting.params_of(SMALLER)),
    ]
    target = Target(counting.MODEL, SamplingConfig())
    options = benchmark.Options(batches=(2,), new_tokens=12, groups=2, repeats=1)
    rows = benchmark.benchmark(
        target,
        counting.params_of(),
        methods,
        lambda count: counting.prompts_of([3, 15, 2, 9])[:count],
        options=options,
    )
    plain, cp, *_ = rows
    assert [row["method"] for row in rows] == ["autoregressive", "cp", "hydra", "draft_model"]
    assert all(row["tokens"] == 4 * 11 for row in rows)
    assert plain["trunk_calls"] == 44
    assert plain["tokens_per_call"] == plain["speedup"] == 1
    assert plain["draft_ms"] == 0 < cp["draft_ms"]
    assert cp["tokens_per_call"] > 1.2
    assert cp["rank"] == 3
    assert len(cp["per_request"]) == 4
    for row in rows:
        assert row["verify_ms"] >= 0
        assert 0 < row["token_ms_p50"] <= row["token_ms_p95"]
        assert row["peak_bytes"] > 0


def test_the_cost_of_a_head():
    row = benchmark.head_cost("cp r2 n3", counting.MODEL, HeadConfig(2, 3, expander_rank=4))
    assert row["drafter_parameters"] == 16 * 2 + 3 * 2 * 2 * 16 * 4
    assert row["draft_ms"] > 0
