# SPDX-License-Identifier: Apache-2.0
"""Rows of expected acceptance from trained runs, what tuning chooses, and figures of both."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lm import plots, setup, transformer
from lm.config import DataConfig, ModelConfig, SamplingConfig
from lm.cp_heads import checkpoints, decode, drafters, evaluate, figures, head
from lm.cp_heads.checkpoints import Loaded
from lm.cp_heads.config import CpConfig
from lm.cp_heads.head import HeadConfig
from lm.errors import UserError
from lm.workdir import Workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def config(folder):
    tree = folder / "tree"
    tree.mkdir()
    for i in range(12):
        lines = (f"name_{i * j} = {j} + len(names[{i}])\n" for j in range(6))
        (tree / f"file{i}.py").write_text("".join(lines))
    return CpConfig(
        model=ModelConfig(num_layers=1, embed_dim=32, head_dim=8, mlp_dim=48),
        head=HeadConfig(rank=2, predicted=3, expander_rank=4),
        data=DataConfig(
            source=f"python:{tree}",
            seq_len=64,
            window=8,
            validation_fraction=0.5,
            eval_conversations=6,
        ),
        sampling=SamplingConfig(temperature=1.0, max_new_tokens=24),
    )


@pytest.fixture(scope="module")
def loaded(config):
    """A random model with a random head; its tables are sharp, so that drafts can be wrong."""
    resolved = setup.resolve(config)
    init = jax.jit(transformer.init, static_argnums=0)
    params = jax.tree.map(lambda x: 2 * x, init(resolved.model, jax.random.key(0)))
    weights = head.init(jax.random.key(1), config.head, resolved.model)
    return Loaded(resolved, params, config.head, weights)


@pytest.fixture(scope="module")
def run(folder):
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text("{}")
    return folder / "run"


@pytest.fixture(scope="module")
def result(config, run, loaded):
    options = evaluate.Options(prompt_tokens=16, batch_size=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "load", lambda path, config: loaded)
        return evaluate.run(config, [run], options)


def test_rows_follow_the_contract(result, run):
    rows = result["rows"]
    assert [(row["temperature"], row["n"]) for row in rows] == [(1.0, 2), (1.0, 3)]
    for row in rows:
        assert (row["rank"], row["transition"]) == (2, "identity")
        assert 1 <= row["expected_tokens_per_call"] <= row["n"]
        assert len(row["acceptance"]) == row["n"] - 1
        assert len(row["total_variation"]) == len(row["nll"]) == row["n"]
        assert row["joint_nll"] == pytest.approx(sum(row["nll"]), rel=0.1)
        assert all(0 <= value <= 1 for value in row["total_variation"])
        assert row["sequences"] == 6
    assert rows[0]["method"] == "cp r2 n2 t1"
    best = max(rows, key=lambda row: row["expected_tokens_per_call"])
    assert result["best"] == best["method"]
    assert result["expected_tokens_per_call"] == best["expected_tokens_per_call"]
    assert json.loads(json.dumps(Workdir(run).rows("eval.jsonl"))) == rows


def test_expected_tokens_per_call_are_those_of_decoding(config, result, loaded):
    documents = evaluate.documents_of(loaded.setup, loaded.setup.config.data, "validation")
    target = drafters.Target(loaded.model, config.sampling, valid_vocab=loaded.setup.valid_vocab)
    _, counted = decode.decode(
        target,
        loaded.params,
        drafters.Heads(loaded.head_config),
        loaded.head,
        [ids[:16] for ids in documents] * 10,
        loaded.setup.tokenizer.stop_ids,
        jax.random.key(3),
    )
    measured = counted.summary()["tokens_per_call"]
    row = result["rows"][-1]
    assert row["expected_tokens_per_call"] == pytest.approx(measured, abs=0.15)


def test_corpus_texts_are_the_data(config, loaded):
    params = loaded.params
    options = evaluate.Options(texts="corpus", prompt_tokens=1000)
    data = evaluate.data_of(loaded, config)
    texts = evaluate.texts_of(loaded.setup, params, data, config.sampling, options)
    whole = evaluate.documents_of(loaded.setup, data, "validation")
    assert texts.starts.tolist() == [len(ids) // 2 for ids in whole]
    for text, length, ids in zip(texts.tokens, texts.lengths, whole, strict=True):
        np.testing.assert_array_equal(text[:length], ids[:length])
        assert length == min(len(ids), len(ids) // 2 + 24)


def test_a_draft_vocabulary_accepts_less(config, loaded):
    params = loaded.params
    data = evaluate.data_of(loaded, config)
    options = evaluate.Options(texts="corpus")
    texts = evaluate.texts_of(loaded.setup, params, data, config.sampling, options)
    (_, whole) = evaluate.measure(loaded, params, texts, config.sampling, options)
    few = np.bincount(texts.tokens.reshape(-1), minlength=loaded.model.vocab_size)
    small = dataclasses.replace(loaded.head_config, draft_vocab=8)
    weights = head.with_vocab({**loaded.head, "vocab": {"ids": np.zeros(8, np.int32)}}, few)
    loaded = dataclasses.replace(loaded, head_config=small, head=weights)
    (_, reduced) = evaluate.measure(loaded, params, texts, config.sampling, options)
    assert whole["covered"] == 1
    assert 0.1 < reduced["covered"] < 0.9
    assert reduced["expected_tokens_per_call"] < whole["expected_tokens_per_call"]


def test_other_data_are_used_whole(config):
    other = dataclasses.replace(config.data, source="arithmetic")
    assert evaluate.split_of(config.data, config.data) == "validation"
    assert evaluate.split_of(config.data, other) == "all"


def test_refusals(config, folder):
    with pytest.raises(UserError, match="--texts='made_up' is not one of sampled, corpus"):
        evaluate.Options(texts="made_up")
    with pytest.raises(UserError, match="which checkpoint"):
        evaluate.run(config, [])
    with pytest.raises(UserError, match="no such workdir"):
        figures.gather([folder / "nowhere"])
    (folder / "rows.jsonl").write_text(json.dumps({"method": "tree", "tokens_per_s": 1}))
    with pytest.raises(UserError, match="no row of a CP head"):
        figures.gather([folder / "rows.jsonl"])


ROWS = [
    {
        "method": f"{kind} r{rank} n{n}",
        "rank": rank,
        "transition": transition,
        "n": n,
        "temperature": 1.0,
        "expected_tokens_per_call": 1 + rank / 10 + n / 100,
        "stderr": 0.01,
        "tokens_per_s": 100.0 * rank,
    }
    for kind, transition, ranks in (("cp", "identity", (1, 2)), ("hmm", "constant", (2, 4)))
    for rank in ranks
    for n in (2, 3, 4, 5, 8)
]


def test_figures_hold_the_rows(folder):
    auto = {"method": "autoregressive", "tokens_per_s": 50.0, "temperature": 1.0}
    big = {**ROWS[0], "method": "cp r1 n2 again", "batch": 8, "tokens_per_s": 9e9}
    path = folder / "benchmark.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*ROWS, auto, big, ROWS[-1]]))
    rows = figures.gather([path])
    assert len(rows) == len(ROWS) + 2
    drawn = figures.draw(rows)
    assert set(drawn) == {"acceptance_t1", "speed_t1"}
    lines = figures.lines_of(rows, "expected_tokens_per_call", "stderr")
    assert set(lines) == {f"{kind} n={n}" for kind in ("cp", "hmm") for n in (2, 4, 8)}
    # rank 1 begins the line of either kind
    assert lines["hmm n=4"] == [
        (1, pytest.approx(1.14), pytest.approx(0.0196)),
        (2, pytest.approx(1.24), pytest.approx(0.0196)),
        (4, pytest.approx(1.44), pytest.approx(0.0196)),
    ]
    assert any(text.get_text() == "autoregressive" for text in drawn["speed_t1"].axes[0].texts)
    saved = figures.save(drawn, folder / "plots")
    assert len(saved) == 2
    assert (folder / "plots" / "speed_t1_by_rank.png").read_bytes().startswith(b"\x89PNG")
    assert plots.colour("cp n=4") != plots.colour("hmm n=4")
