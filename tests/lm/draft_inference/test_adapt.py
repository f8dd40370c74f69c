# SPDX-License-Identifier: Apache-2.0
"""The distillation loss against its formula, row by row; and the search of `tune`."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import contexts, losses, train, transformer
from lm.data import packing
from lm.draft_inference import adapt, tune
from lm.draft_inference.config import DraftConfig, DraftSettings
from lm.errors import UserError
from lm.long_context import exact, rows
from lm.workdir import Workdir
from ops.visibility import Visibility
from tests.lm.long_context.small import MODEL

DRAFT = dataclasses.replace(MODEL, num_layers=1, embed_dim=16)
REAL = 60  # of 64 rows of the table
PROMPT, ANSWER = np.arange(5, 25, dtype=np.int32), np.array([3, 1, 4, 1, 5], np.int32)


def law(model, params, tokens):
    context = contexts.Training(Visibility(jnp.full((1, len(tokens)), len(tokens), jnp.int32)))
    slots = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    states, _ = transformer.hidden(model, params, jnp.asarray(tokens)[None], slots, context)
    return np.asarray(jax.nn.log_softmax(transformer.logits(model, params, states)[0, :, :REAL]))


def test_the_loss_is_the_weighted_divergence():
    draft, target = exact.random_params(DRAFT, 0), exact.random_params(MODEL, 1)
    layout = rows.layout(PROMPT, [(np.zeros(0, np.int32), ANSWER)], 0.25)
    config = DraftConfig()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seq_len=64, window=2),
        train=dataclasses.replace(config.train, batch_size=1),
    )
    (host,) = adapt._data(config, [layout], 1)
    batch = train.to_device(host, None)
    assert packing.HIDDEN_FIELDS[0] not in batch
    objective = adapt.objective(DRAFT, MODEL, REAL, losses.Execution())

    def loss(params):
        total, sums = objective({**params, "target": target}, batch, jax.random.key(0))
        return -total, sums

    (value, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(draft)
    whole = np.concatenate([PROMPT, ANSWER])
    own, mine = law(MODEL, target, whole), law(DRAFT, draft, whole)
    each = np.sum(np.exp(own) * (own - mine), axis=-1)[:-1]
    weights = np.where(np.arange(len(each)) < len(PROMPT) - 1, 0.25, 1.0)
    np.testing.assert_allclose(value, each @ weights, rtol=1e-4)
    np.testing.assert_allclose(sums["weight"], weights.sum(), rtol=1e-6)
    assert all(np.any(np.asarray(x)) for x in jax.tree.leaves(gradient))


def test_answers_of_others_are_not_learnt(tmp_path):
    speaker = SimpleNamespace(params=exact.random_params(MODEL, 1))
    other = SimpleNamespace(params=exact.random_params(MODEL, 2))
    for name in "ab":
        (tmp_path / name).write_text(name)
    place = Workdir(tmp_path)
    about = adapt._about(place, speaker, tmp_path / "b", 8, False)
    assert about != adapt._about(place, speaker, tmp_path / "a", 8, False)  # nothing learnt yet
    about = adapt._about(place, speaker, tmp_path / "a", 8, False)
    place.write(adapt.LEARNT, json.dumps(about))
    assert adapt._about(place, speaker, tmp_path / "a", 8, False) == about
    for given, names in (
        ((speaker, tmp_path / "b", 8, False), "prompts"),
        ((other, tmp_path / "a", 8, False), "target"),
        ((speaker, tmp_path / "a", 9, True), "new_tokens and chat"),
    ):
        with pytest.raises(UserError, match=f"learnt from another {names}: use another"):
            adapt._about(place, *given)


def test_tune_takes_the_smallest_budget_then_the_smallest_draft():
    plain = DraftSettings(window=4)
    options = tune.Options(budgets=(8, 16, 32, 64, 99), kernels=(1, 7))
    groups = tune.settings(plain, options, ("small", "large"), 80)
    assert len(groups) == 4
    assert [one.budget for one in groups[0]] == [8, 16, 32, 64]
    asked = []

    def measure(settings):
        asked.append(settings)
        enough = 32 if settings.kernel == 7 else 64
        return {"agreement": float(settings.budget >= enough)}

    sizes = {"small": 1, "large": 2}
    chosen = tune.choose(measure, groups, 0.9, lambda one: sizes[one.path])
    assert (chosen.path, chosen.budget, chosen.kernel) == ("small", 32, 7)
    assert len(set(asked)) < 4 * 4  # sought by halving
    assert tune.choose(lambda _: {"agreement": 0.0}, groups, 0.9, lambda _: 0) is None
    with pytest.raises(UserError, match="which draft"):
        tune.settings(plain, options, (), 80)
    with pytest.raises(UserError, match="no budget"):
        tune.settings(plain, tune.Options(budgets=(4,)), ("small",), 80)
