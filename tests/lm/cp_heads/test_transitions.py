# SPDX-License-Identifier: Apache-2.0
"""Of a hidden Markov source transitions learn what a mixture of whole futures cannot."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import losses, train
from lm.config import ModelConfig, OptimizerConfig
from lm.cp_heads import head
from lm.cp_heads import losses as cp_losses
from lm.cp_heads.head import HeadConfig
from lm.cp_heads.losses import Futures, LossConfig

V, R, P, D = 6, 3, 4, 4
MODEL = ModelConfig(vocab_size=V, embed_dim=D, head_dim=2)
EVERY = np.array(list(itertools.product(range(V), repeat=P)), np.int32)


def source():
    """Probabilities [V^P] of a chain that mostly moves on, each state with tokens of its own."""
    emit = np.full((R, V), 0.01)
    for state in range(R):
        emit[state, 2 * state : 2 * state + 2] = 0.48
    move = 0.3 * np.eye(R) + 0.7 * np.roll(np.eye(R), 1, axis=1)
    belief = np.full((len(EVERY), R), 1 / R)
    for step in range(P):
        belief = belief * emit[:, EVERY[:, step]].T
        if step < P - 1:
            belief = belief @ move
    return belief.sum(1)


def learnt(transition, steps=200):
    """The expected NLL of two heads after training on every future, weighted by its chance."""
    config = HeadConfig(R, P, transition, "direct")
    schedule = OptimizerConfig(learning_rate=0.03, warmup_steps=5, clip_norm=0.0)
    optimizer = train.make_optimizer(schedule, steps)
    states, table = jnp.ones((1, len(EVERY), D)), jnp.zeros((V, D))
    targets = jnp.asarray(EVERY)[None]
    rows, weights = jnp.arange(len(EVERY))[None], jnp.asarray(source(), jnp.float32)[None]
    futures = Futures(rows, targets, targets, weights)

    def loss(params):
        laws = [head.log_probs(params, config, states[0, 0], s, table) for s in range(P)]
        log_a = jnp.stack([law[:, EVERY[:, s]].T for s, law in enumerate(laws)], axis=1)[None]
        total, sums = cp_losses.head_loss(
            params, config, LossConfig(), MODEL, table, states, futures, losses.Execution(), log_a
        )
        return -total, sums["head_nll"].sum()

    def step(carry, _):
        params, state = carry
        (_, nll), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), nll

    def run(key):
        params = head.init(key, config, MODEL)
        return jax.lax.scan(step, (params, optimizer.init(params)), None, steps)[1][-1]

    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 2)))


@pytest.fixture(scope="module")
def entropy():
    chance = source()
    return -(chance * np.log(chance)).sum()


def test_a_mixture_cannot(entropy):
    assert learnt("identity").min() > entropy + 0.15


@pytest.mark.parametrize("transition", ["constant", "linear"])
def test_transitions_learn_the_chain(transition, entropy):
    assert learnt(transition).max() < entropy + 0.1
