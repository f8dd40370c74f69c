# SPDX-License-Identifier: Apache-2.0
"""linear_log_prob: the reference against float64 loops, every implementation against the
reference."""

from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from ops import _linear_log_prob_xla, dispatch
from ops.linear_log_prob import linear_log_prob
from tests.ops.op_cases import DRAW_ONLY, arrays, cpu_mesh, jit
from tests.ops.op_tolerances import assert_close

IMPLEMENTATIONS = ("xla",)  # those compared with the reference
SETTINGS = [(None, None), (2.0, None), (None, 23), (2.0, 23)]  # softcap, valid_vocab


def small_chunks(monkeypatch, rows):
    monkeypatch.setattr(_linear_log_prob_xla, "chunk_rows", lambda *shape: rows)


def problem(R, D, V, dtype="float32", seed=0):
    """x, w, targets with a third of padding, weights (some zero)."""
    x, w = arrays(seed, (R, D), (V, D), dtype=dtype)
    rng = np.random.default_rng(seed)
    targets = np.where(rng.random(R) < 0.3, -1, rng.integers(0, min(V, 23), R))
    weights = np.where(rng.random(R) < 0.2, 0, rng.standard_normal(R))
    return x, w, jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32)


@partial(jit, static_argnums=(0, 1, 2, 3))
def value_and_gradients(implementation, softcap, valid_vocab, chunk, x, w, targets, weights):
    """Both forms with all their gradients; `chunk` separates jit's entries."""
    del chunk
    call = partial(linear_log_prob, implementation=implementation)

    def general(x, w):
        log_prob = call(x, w, targets, None, softcap, valid_vocab)
        return jnp.sum(jnp.sin(log_prob)), log_prob

    def weighted(x, w, weights):
        total, log_prob = call(x, w, targets, weights, softcap, valid_vocab)
        return 3.0 * total + jnp.sum(log_prob), (total, log_prob)  # log_prob passes no gradient

    return (
        jax.value_and_grad(general, (0, 1), has_aux=True)(x, w),
        jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)(x, w, weights),
    )


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def compare(arguments, softcap=None, valid_vocab=None, chunk=None):
    dtype = arguments[0].dtype
    expected = value_and_gradients("reference", softcap, valid_vocab, None, *arguments)
    for name in IMPLEMENTATIONS:
        actual = value_and_gradients(name, softcap, valid_vocab, chunk, *arguments)
        assert dtypes(actual) == dtypes(expected)
        assert_close(actual, expected, dtype)


@pytest.mark.parametrize(("softcap", "valid_vocab"), SETTINGS)
def test_reference_is_the_definition(softcap, valid_vocab):
    x, w, targets, weights = problem(9, 5, 31)
    call = jit(partial(linear_log_prob, implementation="reference"), static_argnums=(4, 5))
    logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    logits = logits[:, :valid_vocab]
    expected = np.zeros(9)
    for row, target in enumerate(np.asarray(targets)):
        if target >= 0:
            expected[row] = logits[row, target] - np.log(np.exp(logits[row]).sum())
    assert_close(call(x, w, targets, None, softcap, valid_vocab), expected, "float32")
    total, log_prob = call(x, w, targets, weights, softcap, valid_vocab)
    assert_close((total, log_prob), ((expected * weights).sum(), expected), "float32")


@pytest.mark.parametrize(("softcap", "valid_vocab"), SETTINGS)
def test_settings_against_the_reference(softcap, valid_vocab, monkeypatch):
    small_chunks(monkeypatch, 8)
    compare(problem(29, 6, 31), softcap, valid_vocab, 8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_against_the_reference(dtype, monkeypatch):
    small_chunks(monkeypatch, 16)
    compare(problem(40, 32, 64, dtype), 4.0, 60, 16)


def test_one_chunk_and_many_rows():
    compare(problem(300, 16, 50))


@hypothesis.settings(max_examples=3, deadline=None, phases=DRAW_ONLY)
@hypothesis.given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 40), st.integers(1, 24))
def test_drawn_shapes(R, D, V, chunk):
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_chunks(monkeypatch, chunk)
        compare(problem(R, D, V), chunk=chunk)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_padding_has_no_value_and_no_gradient(implementation):
    x, w, targets, weights = problem(29, 6, 31)
    results = value_and_gradients(implementation, None, None, None, x, w, targets, weights)
    padding = np.asarray(targets) < 0
    (_, log_prob), (dx, _) = results[0]
    (_, (_, weighted_log_prob)), (weighted_dx, _, d_weights) = results[1]
    for values in (log_prob, weighted_log_prob, dx, weighted_dx, d_weights):
        np.testing.assert_array_equal(np.asarray(values)[padding], 0)
    assert (np.asarray(log_prob)[~padding] < 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chunks_of_padding_are_not_computed(implementation, monkeypatch):
    """Padding rows full of NaN leave no trace in the gradient of w when they fill whole chunks."""
    small_chunks(monkeypatch, 8)
    x, w, targets, weights = problem(32, 6, 31)
    x, targets = x.at[8:24].set(jnp.nan), targets.at[8:24].set(-1)
    results = value_and_gradients(implementation, None, None, "nan", x, w, targets, weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_impossible_targets_have_log_probability_minus_infinity(implementation):
    x, w, _, weights = problem(4, 3, 10)
    targets = jnp.array([9, 10, 2**31 - 1, 6], jnp.int32)  # valid, beyond, far beyond, excluded
    plain = partial(linear_log_prob, implementation=implementation)
    call = jit(plain, static_argnums=5)
    np.testing.assert_array_equal(
        np.isneginf(call(x, w, targets)), np.array([False, True, True, False])
    )
    excluded = call(x, w, targets, None, None, 6)
    np.testing.assert_array_equal(np.isneginf(excluded), True)
    # A row of weight 0 does not count, so it cannot make the total NaN.
    total, _ = call(x, w, targets, jnp.array([1.0, 0.0, 0.0, 1.0]))
    assert np.isfinite(total)
    assert np.isneginf(call(x, w, targets, jnp.ones(4))[0])
    gradients_of = jit(jax.grad(lambda *a: plain(a[0], a[1], targets, a[2])[0], (0, 1, 2)))
    for weights in (jnp.ones(4), jnp.array([1.0, 0.0, 0.0, 1.0])):
        gradients = gradients_of(x, w, weights)
        assert not any(np.isnan(gradient).any() for gradient in gradients)


def test_products_of_each_form():
    """Recomputed logits cost a product; a gradient that nobody asks for costs none."""
    x, w, targets, weights = problem(29, 6, 31)

    def general(x, w):
        return linear_log_prob(x, w, targets, implementation="xla").sum()

    def weighted(x, w):
        return linear_log_prob(x, w, targets, weights, implementation="xla")[0]

    def products(function):
        return str(jax.make_jaxpr(function)(x, w)).count("dot_general")

    assert products(general) == products(weighted) == 1
    assert products(jax.grad(general, (0, 1))) == 4
    assert products(jax.grad(weighted, (0, 1))) == 3
    assert products(jax.grad(weighted, 0)) == products(jax.grad(weighted, 1)) == 2


@pytest.mark.parametrize("dtype", ["int32", "bfloat16", "bool"])
def test_weights_of_any_type(dtype):
    x, w, targets, weights = problem(9, 5, 31)
    weights = (2 * weights).astype(dtype)

    def total(x, implementation, weights):
        return linear_log_prob(x, w, targets, weights, implementation=implementation)[0]

    expected = jit(partial(jax.grad(total), implementation="reference"))(
        x, weights=weights.astype(jnp.float32)
    )
    actual = jit(partial(jax.grad(total), implementation="xla"))(x, weights=weights)
    assert_close(actual, expected, "float32")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_chunk_rows(platform):
    """Within the budget, but for rounding to 8 rows and the least number of rows."""
    rows = _linear_log_prob_xla.chunk_rows
    with dispatch.target_platform(platform):
        assert rows(1000, 300) == 1000
        for num_rows, vocab in ((32768, 128256), (32768, 10**6), (1001, 10**7)):
            chunk, budget = rows(num_rows, vocab), _linear_log_prob_xla.logit_bytes()
            assert (chunk - 8) * vocab * 4 <= max(budget, 128 * vocab * 4)
            assert chunk >= min(128, num_rows) - 8


# --- split vocabularies


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("inside", [False, True])
def test_split_vocabulary_equals_the_whole_one(implementation, inside):
    """w over four devices, rows whole; gradients taken around and inside the shard_map.

    valid_vocab leaves the last device without a single column.
    """
    x, w, targets, weights = problem(20, 6, 32)
    targets = targets.at[0].set(31)  # excluded
    weights = weights.at[0].set(0.0)
    mesh = cpu_mesh(vocab=4)
    specs = {"mesh": mesh, "in_specs": (P(), P("vocab"), P(), P())}

    def losses(x, w, targets, weights, vocab_axis=None, implementation="reference"):
        call = partial(
            linear_log_prob,
            softcap=3.0,
            valid_vocab=23,
            vocab_axis=vocab_axis,
            implementation=implementation,
        )
        log_prob = call(x, w, targets)
        counted = jnp.where(log_prob == -jnp.inf, 0.0, jnp.sin(log_prob))
        return jnp.sum(counted) + call(x, w, targets, weights)[0], log_prob

    gradients = partial(jax.value_and_grad, argnums=(0, 1, 3), has_aux=True)
    expected = jit(gradients(losses))(x, w, targets, weights)
    local = partial(losses, vocab_axis="vocab", implementation=implementation)
    if inside:
        out_specs = ((P(), P()), (P(), P("vocab"), P()))
        split = jax.shard_map(gradients(local), out_specs=out_specs, **specs)
    else:
        split = gradients(jax.shard_map(local, out_specs=(P(), P()), **specs))
    assert_close(jit(split)(x, w, targets, weights), expected, "float32")


@pytest.mark.parametrize("form", ["general", "weighted"])
def test_rows_split_over_devices(form):
    """Rows over four devices, w whole: its gradient is the sum over devices."""
    x, w, targets, weights = problem(32, 6, 31)
    mesh = cpu_mesh(data=4)

    def loss(x, w, targets, weights):
        if form == "weighted":
            return linear_log_prob(x, w, targets, weights, implementation="xla")[0][None]
        return jnp.sin(linear_log_prob(x, w, targets, implementation="xla"))

    specs = {"in_specs": (P("data"), P(), P("data"), P("data")), "out_specs": P("data")}
    split = jax.shard_map(loss, mesh=mesh, **specs)
    expected = jit(jax.grad(lambda *a: loss(*a).sum(), (0, 1)))(x, w, targets, weights)
    actual = jit(jax.grad(lambda *a: split(*a).sum(), (0, 1)))(x, w, targets, weights)
    assert_close(actual, expected, "float32")


# --- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((4, 5))}, "do not fit together"),
        ({"x": jnp.zeros((2, 4, 3))}, "do not fit together"),
        ({"w": jnp.zeros((0, 3))}, "do not fit together"),
        ({"x": jnp.zeros((4, 3), jnp.int32)}, "x must be floating point"),
        ({"targets": jnp.zeros(5, jnp.int32)}, r"targets must be \(4,\) integers"),
        ({"targets": jnp.zeros(4)}, r"targets must be \(4,\) integers"),
        ({"weights": jnp.zeros(5)}, r"weights must have shape \(4,\)"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"valid_vocab": 0}, "valid_vocab must be between 1 and 10"),
        ({"valid_vocab": 11}, "valid_vocab must be between 1 and 10"),
    ],
)
def test_nonsense_is_refused(change, message):
    arguments = {
        "x": jnp.zeros((4, 3)),
        "w": jnp.zeros((10, 3)),
        "targets": jnp.zeros(4, jnp.int32),
    }
    with pytest.raises(ValueError, match=message):
        linear_log_prob(**{**arguments, **change})
