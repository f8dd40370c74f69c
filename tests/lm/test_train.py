# SPDX-License-Identifier: Apache-2.0
"""The optimiser, weightings, and what a step does with bad numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import train
from lm.config import OptimizerConfig


def first_updates(config, steps=8, total=8):
    """Sizes of the updates that a constant gradient gives, per step."""
    params = {"layers": {"q": {"kernel": jnp.ones((2, 3))}}, "final_norm": {"scale": jnp.ones(3)}}
    optimizer = train.make_optimizer(config, total)
    state = optimizer.init(params)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), params)
    sizes = []
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, params)
        sizes.append(jax.tree.map(lambda u: float(jnp.abs(u).max()), updates))
    return sizes


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warmup_then_schedule(schedule):
    config = OptimizerConfig(
        learning_rate=1.0, schedule=schedule, warmup_steps=3, final_fraction=0.1
    )
    rates = [size["final_norm"]["scale"] for size in first_updates(config)]
    assert rates[0] == pytest.approx(0.25, rel=1e-3)
    assert rates[3] == pytest.approx(1.0, rel=1e-3)
    if schedule == "constant":
        assert rates[-1] == pytest.approx(1.0, rel=1e-3)
    else:
        assert rates[3] > rates[4] > rates[-1] > 0.1
    if schedule == "linear":
        assert rates[-1] == pytest.approx(1 - 0.9 * 4 / 5, rel=1e-3)


def test_decay_touches_matrices_only():
    plain = first_updates(OptimizerConfig(learning_rate=1.0, warmup_steps=0), steps=1)[0]
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5)
    decayed = first_updates(config, steps=1)[0]
    assert decayed["final_norm"] == plain["final_norm"]
    assert decayed["layers"]["q"]["kernel"] == pytest.approx(plain["layers"]["q"]["kernel"] + 0.5)


def test_clipping_bounds_the_norm():
    params = {"scale": jnp.ones(4)}
    grads = {"scale": jnp.full(4, 100.0)}
    optimizer = train.make_optimizer(OptimizerConfig(clip_norm=1.0, eps=1.0, warmup_steps=0), 5)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    loose = train.make_optimizer(OptimizerConfig(clip_norm=0.0, eps=1.0, warmup_steps=0), 5)
    unclipped, _ = loose.update(grads, loose.init(params), params)
    assert float(jnp.abs(updates["scale"]).max()) < 0.5 * float(jnp.abs(unclipped["scale"]).max())


def test_partition_and_merge_are_inverse():
    params = {"a": {"kernel": 1, "lora_a": 2, "lora_b": 3}, "b": {"scale": 4}}
    config = dataclasses.make_dataclass("C", ["lora"])(dataclasses.make_dataclass("L", ["rank"])(2))
    trained, frozen = train.partition(config, params)
    assert trained == {"a": {"lora_a": 2, "lora_b": 3}}
    assert train.merge(trained, frozen) == params
    config.lora.rank = 0
    assert train.partition(config, params) == (params, {})


def test_means_of_sums():
    sums = {
        "loss_per_token": 6.0,
        "weight_per_token": 4.0,
        "loss_per_turn": 1.0,
        "weight_per_turn": 0.0,
    }
    means = train.mean_losses(sums)
    assert means["loss_per_token"] == 1.5
    assert math.isnan(means["loss_per_turn"])


def test_digest_sees_every_bit():
    params = {"a": np.zeros(3, np.float32), "b": {"c": np.ones(2, np.float32)}}
    base = train.params_sha256(params)
    assert base == train.params_sha256(jax.tree.map(jnp.asarray, params))
    params["b"]["c"][1] = np.nextafter(np.float32(1), np.float32(2))
    assert train.params_sha256(params) != base
