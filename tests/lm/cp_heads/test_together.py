# SPDX-License-Identifier: Apache-2.0
"""Heads that are trained together learn what each learns alone."""

import dataclasses

import jax
import numpy as np
import pytest

from lm import losses, train
from lm.config import OptimizerConfig, TrainConfig
from lm.cp_heads import baselines, futures, together, training
from lm.cp_heads.baselines import Hydra
from lm.cp_heads.config import CpConfig
from lm.cp_heads.head import HeadConfig
from lm.cp_heads.losses import LossConfig
from lm.errors import UserError
from tests.lm.cp_heads.test_training import MODEL, config_of, parts, rows

CP = HeadConfig(2, 3, expander_rank=4)
HMM = HeadConfig(3, 2, "linear", expander_rank=4)
MEMBERS = {"cp": CP, "hmm": HMM, "hydra": Hydra(3, 4)}
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, clip_norm=0.0, eps=1e-4)


def trained(objective, params, predicted, steps=2):
    """What `steps` steps make of `params`, and the metrics of the last one."""
    optimizer = train.make_optimizer(OPTIMIZER, 10)
    step = jax.jit(train.make_step(objective, optimizer, TrainConfig(batch_size=8), "float32"))
    frozen = parts(config_of("heads", CP))[1]
    state = train.init_state(params, optimizer, 0, None)
    batch = futures.with_futures(rows(), predicted)
    for _ in range(steps):
        state, sums = step(state, frozen, batch)
    return jax.device_get(state.params), sums


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a, b)


def test_each_learns_as_if_alone():
    execution = losses.Execution(valid_vocab=50)
    options = LossConfig(mode="heads")
    params = together.init(jax.random.key(0), MEMBERS, MODEL)
    whole = together.objective(MEMBERS, MODEL, options, execution)
    got, sums = trained(whole, {"head": params}, together.longest(MEMBERS))
    values = together.metrics(sums)
    # the shorter of the two: its futures are beginnings of the others'
    alone = training.objective(MODEL, HMM, options, execution)
    wanted, own = trained(alone, {"head": params["hmm"]}, HMM.predicted)
    same(got["head"]["hmm"], wanted["head"])
    assert values["nll/hmm"] == pytest.approx(training.metrics(own)["head"], rel=1e-4)
    alone = baselines.hydra_objective(MEMBERS["hydra"], MODEL, execution)
    wanted, own = trained(alone, {"hydra": params["hydra"]}, 3)
    same(got["head"]["hydra"], wanted["hydra"])
    assert values["loss_per_token"] == pytest.approx(sum(values[f"nll/{name}"] for name in MEMBERS))


def test_rows_of_the_vocabulary():
    assert together.rows_of(MEMBERS) == 2 * 3 + 3 * 2 + 2


@pytest.mark.parametrize(
    ("members", "changes", "reason"),
    [
        ({}, {}, "no heads to train"),
        ({"cp": CP}, {"optimizer": OptimizerConfig()}, "optimizer.clip_norm=0"),
        ({"cp": CP}, {"loss": LossConfig(distill=0.5)}, "loss.distill=0"),
        ({"cp": dataclasses.replace(CP, expander="direct")}, {}, "share the model's vocabulary"),
        ({"cp": dataclasses.replace(CP, draft_vocab=8)}, {}, "share the model's vocabulary"),
    ],
)
def test_refusals(members, changes, reason):
    config = dataclasses.replace(CpConfig(optimizer=OPTIMIZER), **changes)
    with pytest.raises(UserError, match=reason):
        together.check(config, members)
