# SPDX-License-Identifier: Apache-2.0
"""The CP likelihood against enumeration: every future, every path through the components."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import losses as lm_losses
from lm import transformer
from lm.config import ModelConfig
from lm.cp_heads import futures, head, losses
from lm.data import packing
from lm.errors import UserError
from lm.single_pass import tree
from tests.lm.cp_heads.test_futures import branching, dialogue

V, P, R, D = 3, 3, 2, 4
MODEL = ModelConfig(
    vocab_size=16, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8
)
TINY = ModelConfig(vocab_size=V, embed_dim=D)
EVERY = np.array(list(itertools.product(range(V), repeat=P)), np.int32)  # all futures
RUN = lm_losses.Execution()


def setting(config, seed=0, scale=1.0):
    """A head with large random parameters, a hidden state and a table."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = head.init(keys[0], config, TINY)
    leaves, treedef = jax.tree.flatten(params)
    noise = jax.random.split(keys[1], len(leaves))
    leaves = [
        x + scale * jax.random.normal(k, x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for x, k in zip(leaves, noise, strict=True)
    ]
    h, table = jax.random.normal(keys[2], (D,)), jax.random.normal(keys[1], (V, D))
    return jax.tree.unflatten(treedef, leaves), h, table


@functools.partial(jax.jit, static_argnums=(1, 4))
def enumerated(params, config, h, table, softcap=None):
    """p(y) of every future [V^P], as a sum over all R^P paths of products of probabilities."""
    steps = range(config.predicted)
    p = [jnp.exp(head.log_probs(params, config, h, s, table, softcap=softcap)) for s in steps]
    moves = [head.transition(params, config, h, s) for s in steps[:-1]]
    moves = [jnp.eye(config.rank) if move is None else jnp.exp(move) for move in moves]
    paths = np.array(list(itertools.product(range(config.rank), repeat=config.predicted)))
    terms = jnp.exp(head.gate(params, h))[paths[:, 0], None]  # [R^P, 1]
    for s in steps:
        terms = terms * p[s][paths[:, s, None], EVERY[None, :, s]]
        if s < config.predicted - 1:
            terms = terms * moves[s][paths[:, s], paths[:, s + 1]][:, None]
    return terms.sum(0)


@functools.partial(jax.jit, static_argnums=(1, 4))
def from_loss(params, config, h, table, softcap=None):
    """log q(y_s | y_<s) [V^P, P] of every future, as training computes it."""
    states = jnp.broadcast_to(h, (1, len(EVERY), D))
    mask = jnp.ones((1, *EVERY.shape), bool)
    log_a = losses.component_log_probs(
        params, config, states, jnp.asarray(EVERY)[None], table, RUN, softcap
    )
    log_A = losses.transitions(params, config, states)
    return losses.joint_log_prob(head.gate(params, states), log_a, log_A, mask)[0]


@pytest.mark.parametrize(
    ("kind", "expander"),
    [("identity", "low_rank"), ("constant", "full"), ("linear", "mlp"), ("linear", "direct")],
)
def test_the_joint_is_the_enumerated_one(kind, expander):
    config = head.HeadConfig(R, P, kind, expander, expander_rank=2)
    params, h, table = setting(config)
    softcap = 2.0 if expander == "full" else None
    coefficients = jax.random.normal(jax.random.key(9), (len(EVERY),))

    def ours(params, h, table):
        log_q = from_loss(params, config, h, table, softcap).sum(-1)
        return coefficients @ log_q, log_q

    def theirs(params, h, table):
        log_q = jnp.log(enumerated(params, config, h, table, softcap))
        return coefficients @ log_q, log_q

    got, got_log = jax.jit(jax.grad(ours, (0, 1, 2), has_aux=True))(params, h, table)
    want, want_log = jax.jit(jax.grad(theirs, (0, 1, 2), has_aux=True))(params, h, table)
    assert float(jnp.exp(got_log).sum()) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(got_log, want_log, rtol=1e-5)

    def close(a, b):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(float(jnp.abs(b).max()), 1e-3))

    jax.tree.map(close, got, want)


@pytest.mark.parametrize("kind", ["identity", "linear"])
def test_conditionals_are_ratios_of_marginals(kind):
    config = head.HeadConfig(R, P, kind, expander_rank=2)
    params, h, table = setting(config)
    log_q = np.asarray(from_loss(params, config, h, table)).reshape(V, V, V, P)
    joint = np.asarray(enumerated(params, config, h, table), np.float64).reshape(V, V, V)
    first, second = joint.sum((1, 2)), joint.sum(2)
    np.testing.assert_allclose(np.exp(log_q[:, 0, 0, 0]), first, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_q[:, :, 0, 1]), second / first[:, None], rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_q[..., 2]), joint / second[..., None], rtol=1e-5)


def test_a_prefix_mask_marginalises_the_rest():
    config = head.HeadConfig(R, P, "constant", expander_rank=2)
    params, h, table = setting(config)
    states = jnp.broadcast_to(h, (1, len(EVERY), D))
    targets = jnp.asarray(np.where(np.arange(P) < 2, EVERY, -1))[None]

    @jax.jit
    def masked(params, states, table):
        log_a = losses.component_log_probs(params, config, states, targets, table, RUN)
        log_A = losses.transitions(params, config, states)
        return losses.joint_log_prob(head.gate(params, states), log_a, log_A, targets >= 0)[0]

    got = masked(params, states, table)
    whole = from_loss(params, config, h, table)
    np.testing.assert_allclose(got[:, :2], whole[:, :2], rtol=1e-5)
    assert (np.asarray(got[:, 2]) == 0).all()


def test_an_hmm_that_never_moves_is_cp():
    rng = np.random.default_rng(0)
    log_w = jnp.asarray(np.log(rng.dirichlet(np.ones(R), len(EVERY))), jnp.float32)
    log_a = jnp.asarray(np.log(rng.uniform(0.01, 1, (len(EVERY), P, R))), jnp.float32)
    mask = jnp.ones(EVERY.shape, bool)
    stay = jnp.broadcast_to(jnp.log(jnp.eye(R)), (len(EVERY), P - 1, R, R))

    def total(log_w, log_a, log_A):
        return losses.joint_log_prob(log_w, log_a, log_A, mask).sum()

    value = jax.jit(jax.value_and_grad(total, (0, 1)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        value(log_w, log_a, stay),
        value(log_w, log_a, None),
    )


def test_gradients_are_responsibilities():
    """d L / d a[s, c] = rho_c, and w - rho at the gate's logits, for rank 3 by hand."""
    log_w = jax.nn.log_softmax(jnp.array([0.1, -1.0, 0.4]))
    log_a = jax.random.normal(jax.random.key(0), (P, 3))
    mask = jnp.ones(P, bool)

    def total(logits, log_a):
        return losses.joint_log_prob(jax.nn.log_softmax(logits), log_a, None, mask).sum()

    by_gate, by_a = jax.jit(jax.grad(total, (0, 1)))(log_w, log_a)
    rho = jax.nn.softmax(log_w + log_a.sum(0))
    np.testing.assert_allclose(by_a, jnp.broadcast_to(rho, (P, 3)), rtol=1e-5)
    np.testing.assert_allclose(by_gate, rho - jnp.exp(log_w), atol=1e-6)


def to_futures(batch):
    return losses.Futures(*(jnp.asarray(batch[name]) for name in futures.FUTURE_FIELDS))


@functools.partial(jax.jit, static_argnums=1)
def trunk(batch, model=MODEL):
    params = transformer.init(model, jax.random.key(0))
    states = lm_losses.forward(model, params, jax.tree.map(jnp.asarray, batch), RUN)
    return states, transformer.unembedding(model, params)


@functools.cache
def tree_program():
    config = head.HeadConfig(3, 3, "constant", expander_rank=2)
    options = losses.LossConfig(balance=0.0, discount=0.7)

    def total(params, batch):
        states, table = trunk(batch)
        return losses.head_loss(
            params, config, options, MODEL, table, states, to_futures(batch), RUN
        )

    params = head.init(jax.random.key(1), config, MODEL)
    step = jax.jit(jax.grad(total, has_aux=True))

    def run(rows):  # always six rows, so that one program serves
        rows = [*rows, *[packing.empty_row(64)] * (6 - len(rows))]
        return step(params, futures.with_futures(packing.stack(rows), 3))

    return run


@pytest.mark.parametrize("make", [branching, dialogue])
def test_a_tree_trains_what_its_samples_train(make):
    """Loss and gradients of one prefix tree against one chain per sample."""
    samples = make(np.random.default_rng(3))
    got, sums = tree_program()(packing.pack([tree.build_tree(samples)], 64))
    want, expected = tree_program()([packing.pack([tree.chain(one)], 64)[0] for one in samples])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), sums, expected)
    assert float(sums["head_weight"]) == sum(len(s.tokens) - s.prompt_length for s in samples)


def small_batch(predicted, rows=2, length=24):
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 12, (rows, length)),
        "positions": np.tile(np.arange(length), (rows, 1)),
        "until": np.full((rows, length), length),
        "edge_rows": np.tile(np.arange(length), (rows, 1)),
    }
    targets = np.full((rows, length), -1)
    targets[:, : length - 1] = batch["tokens"][:, 1:]
    batch["edge_targets"] = targets
    batch = {name: x.astype(np.int32) for name, x in batch.items()}
    batch["edge_weights"] = (targets >= 0).astype(np.float32)
    return futures.with_futures(batch, predicted)


@pytest.mark.parametrize("draft_vocab", [0, 5])
def test_distillation_is_the_kl_to_the_model(draft_vocab, monkeypatch):
    monkeypatch.setattr(losses, "_TEACHER_BYTES", 4096)  # several chunks of positions
    config = head.HeadConfig(2, 2, expander_rank=2, draft_vocab=draft_vocab)
    params = head.init(jax.random.key(1), config, MODEL)
    if draft_vocab:
        params["vocab"]["ids"] = jnp.array([1, 3, 4, 8, 11], jnp.int32)
    batch = small_batch(2)
    states, table = trunk(batch)
    found = to_futures(batch)
    run = lm_losses.Execution(valid_vocab=12)

    def kl(states):
        h = jnp.take_along_axis(states, found.rows[..., None], axis=1)
        targets = losses.draft_targets(params, found.targets)
        kept = losses.draft_execution(params, run)
        log_a = losses.component_log_probs(params, config, h, targets, table, kept)
        belief = losses.forward_beliefs(head.gate(params, h), log_a, None, targets >= 0)
        out = losses.teacher_kl(params, config, MODEL, table, states, found, belief, run)
        log_p = [head.log_probs(params, config, h, s, table, valid_vocab=12) for s in range(2)]
        mixed = jax.nn.log_softmax(belief[..., :-1, :])[..., None] + jnp.stack(log_p, axis=2)
        q = jnp.exp(jax.nn.logsumexp(mixed, axis=-2))
        return jnp.where(targets >= 0, out, 0.0).sum(), (out, q, targets >= 0)

    grads, (got, q, mask) = jax.jit(jax.grad(kl, has_aux=True))(states)
    assert np.isfinite(grads).all()
    logits = np.asarray(states, np.float64) @ np.asarray(table, np.float64).T
    p = np.exp(logits[..., :12] - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    q = np.asarray(q, np.float64)[..., :12]
    rows, children = np.asarray(found.rows), np.asarray(found.children)
    assert np.asarray(mask).sum() > 10
    for b, f, s in zip(*np.nonzero(np.asarray(mask)), strict=True):
        own = p[b, rows[b, f] if s == 0 else children[b, f, s - 1]]
        known = q[b, f, s] > 0
        want = (own[known] * np.log(own[known] / q[b, f, s][known])).sum()
        assert got[b, f, s] == pytest.approx(want, abs=2e-5)


def test_targets_outside_the_draft_vocabulary_end_the_future():
    params = {"vocab": {"ids": jnp.array([2, 5, 9], jnp.int32)}}
    targets = jnp.array([[2, 9, 5], [5, 3, 2], [3, 2, 2], [9, 2, -1]])
    expected = [[0, 2, 1], [1, -1, -1], [-1, -1, -1], [2, 0, -1]]
    np.testing.assert_array_equal(losses.draft_targets(params, targets), expected)


def test_a_fraction_keeps_the_expected_loss():
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((2, 40)) < 0.4, rng.uniform(1, 3, (2, 40)), 0).astype(np.float32)
    rows = jnp.asarray(np.arange(80).reshape(2, 40))
    paths = jnp.broadcast_to(rows[..., None], (2, 40, 3))
    given = losses.Futures(rows, paths, paths, jnp.asarray(weights))
    value = np.asarray(rng.normal(size=80))
    wanted = (weights * value.reshape(2, 40)).sum()
    draw = jax.jit(jax.vmap(lambda key: losses.drawn(key, given, 0.2)))
    picked = jax.device_get(draw(jax.random.split(jax.random.key(0), 300)))
    assert picked.weights.shape == (300, 2, 8)
    assert (picked.weights > 0).all()
    np.testing.assert_array_equal(picked.targets[..., 1], picked.rows)
    seen = (picked.weights * value[picked.rows]).sum(axis=(1, 2))
    assert abs(np.mean(seen) - wanted) < 4 * np.std(seen) / math.sqrt(len(seen))
    assert losses.drawn(jax.random.key(0), given, 1.0) is given


def test_the_balance_term_is_zero_in_balance_only():
    assert float(losses.imbalance(jnp.full(4, 0.25))) == pytest.approx(0, abs=1e-6)
    skewed = jnp.array([0.7, 0.1, 0.1, 0.1])
    wanted = float(jnp.sum(0.25 * jnp.log(0.25 / skewed)))
    assert float(losses.imbalance(skewed)) == pytest.approx(wanted, rel=1e-5)


def test_no_array_of_rows_by_vocabulary():
    """Gradients included, nothing comes near the materialised logits."""
    model = ModelConfig(vocab_size=4096, embed_dim=8)
    config = head.HeadConfig(4, 4, expander_rank=2)
    params = jax.eval_shape(lambda k: head.init(k, config, model), jax.random.key(0))
    shape = (2, 512)
    found = losses.Futures(
        jax.ShapeDtypeStruct(shape, jnp.int32),
        *[jax.ShapeDtypeStruct((*shape, 4), jnp.int32)] * 2,
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    states = jax.ShapeDtypeStruct((*shape, 8), jnp.float32)
    table = jax.ShapeDtypeStruct((4096, 8), jnp.float32)

    def total(params, table, states, found):
        options = losses.LossConfig()
        return losses.head_loss(params, config, options, model, table, states, found, RUN)[0]

    program = jax.jit(jax.grad(total, (0, 1, 2))).lower(params, table, states, found).compile()
    materialised = 4 * 2 * 512 * 16 * 4096
    assert program.memory_analysis().temp_size_in_bytes < materialised / 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mode": "head"}, "loss.mode='head' is not one of"),
        ({"fraction": 0.0}, r"loss.fraction=0.0 must be in \(0, 1\]"),
        ({"distill": 2.0}, "loss.distill=2.0"),
        ({"balance": -1.0}, "loss.balance=-1.0 must not be negative"),
        ({"lora_layers": -1}, "loss.lora_layers=-1"),
    ],
)
def test_bad_options_are_one_line(change, reason):
    with pytest.raises(UserError, match=reason):
        losses.LossConfig(**change)
