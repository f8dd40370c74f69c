# SPDX-License-Identifier: Apache-2.0
"""Studies: stages in their order, what a call without time leaves, weights that outlive a run."""

import json

import jax
import numpy as np
import pytest

from lm import studies, transformer
from lm.config import ModelConfig, to_dict
from lm.draft_inference.config import DraftConfig
from lm.errors import UserError
from lm.hf import weights
from lm.long_context import evaluate, exact, study
from lm.long_context.config import LongContextConfig
from lm.long_context.judge import Judge
from lm.stages import UNLIMITED, Clock, OutOfTime
from lm.studies import Study
from lm.token_select import study as token_select
from lm.workdir import Workdir
from tests.lm.long_context import small
from tests.lm.long_context.judged import CONFIG, PAIR, TABLE

MODEL = ModelConfig(
    vocab_size=384, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16,
    qk_norm=True, dtype="bfloat16",
)  # fmt: skip


def test_stages_end_with_the_first_that_is_not_done(tmp_path):
    ran, late = [], []

    def stage(name):
        def call(_):
            ran.append(name)
            if name in late:
                raise OutOfTime
            return {"found": name}

        return call

    calls = {name: stage(name) for name in ("a", "b", "c")}
    done = studies.run(CONFIG, Workdir(tmp_path), calls)
    assert done == {"stage": "c", "done": True, "found": "c"}
    late.append("b")
    assert studies.run(CONFIG, Workdir(tmp_path), calls) == {"stage": "b", "done": False}
    assert studies.run(CONFIG, Workdir(tmp_path), calls, stage="c")["done"]
    assert ran == ["a", "b", "c", "a", "b", "c"]
    with pytest.raises(UserError, match="--minutes=0 must be above 0"):
        studies.run(CONFIG, Workdir(tmp_path), calls, minutes=0)


def test_answers_outlive_a_call_without_time(tmp_path, monkeypatch):
    """A method that answered before dense attention has its row when that has answered."""
    workdir = Workdir(tmp_path)
    workdir.create(CONFIG)
    options = {"methods": ("token_select", "dense"), "batch_size": 4}

    def judge():
        own = type(PAIR)(**options, samples=2)
        return Judge(CONFIG, TABLE, own, small.speaker(), "x", False, workdir)

    checks = iter([False, True])
    monkeypatch.setattr(Clock, "left", lambda self: -1 if next(checks) else 1)
    with pytest.raises(OutOfTime):
        evaluate.judged(judge(), UNLIMITED)
    assert len(workdir.rows("answers.jsonl")) == 1
    assert workdir.rows("eval.jsonl") == []
    monkeypatch.setattr(Clock, "left", lambda self: 1)
    result = evaluate.judged(judge())
    assert [row["method"] for row in workdir.rows("eval.jsonl")] == ["token_select", "dense"]
    assert len(workdir.rows("answers.jsonl")) == 2
    assert result["summary"][0]["against"] == "dense"
    # dense attention is every setting's
    other = Workdir(tmp_path / "other")
    other.create(CONFIG)
    for _ in range(2):
        token_select._take_dense(workdir, other)
    assert [row["method"] for row in other.rows("eval.jsonl")] == ["dense"]


def test_weights_speak_as_the_run_did(tmp_path):
    work = Study(Workdir(tmp_path), UNLIMITED)
    config = LongContextConfig(model=MODEL)
    with pytest.raises(UserError, match="--stage=train comes first"):
        study.speaker(work, "model", LongContextConfig)
    folder, params = work.weights("model"), exact.random_params(MODEL, 0)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(to_dict(config)))
    weights.save(folder, MODEL, params, tokenizer=small.speaker().tokenizer, dtype="bfloat16")
    found = study.speaker(work, "model", LongContextConfig)
    params = transformer.unstacked(params)
    for mine, kept in zip(jax.tree.leaves(params), jax.tree.leaves(found.params), strict=True):
        np.testing.assert_array_equal(np.asarray(mine, jax.numpy.bfloat16), kept)
    assert found.bos == ""  # a run's prompts are opened by nothing
    # another method's study takes the model over
    values = {**to_dict(config), "select": {"k": 7}}
    (folder / "run.json").write_text(json.dumps(values))
    other = study.speaker(work, "model", DraftConfig)
    for mine, kept in zip(
        jax.tree.leaves(found.params), jax.tree.leaves(other.params), strict=True
    ):
        np.testing.assert_array_equal(mine, kept)
    call = lambda: pytest.fail("it is there")  # noqa: E731
    assert studies.trained(work, "model", config, call, tmp_path)
    longer = LongContextConfig(model=MODEL, train=type(config.train)(steps=7))
    with pytest.raises(UserError, match=r"was trained with train\.steps="):
        studies.trained(work, "model", longer, call, tmp_path)
