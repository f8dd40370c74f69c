# SPDX-License-Identifier: Apache-2.0
"""Rows of expected acceptance from trained runs, what tuning chooses, and figures of both."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lm import plots, setup, transformer
from lm.config import DataConfig, ModelConfig, SamplingConfig
from lm.cp_heads import checkpoints, decode, drafters, evaluate, figures, head, tune
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
    assert setup.split_of([config.data], config.data) == ("validation", config.data)
    assert setup.split_of([config.data], other) == ("all", other)


def test_the_order_of_checkpoints_decides_nothing(config, tmp_path):
    wanted = dataclasses.replace(config.data, source=str(tmp_path / "x.jsonl"))
    other = dataclasses.replace(config.data, source=str(tmp_path / "y.jsonl"))
    for trained in ([wanted, other], [other, wanted]):
        assert setup.split_of(trained, wanted) == ("validation", wanted)
    assert setup.split_of([other], wanted) == ("all", wanted)


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


# --- tune


@pytest.mark.parametrize("kind", ["identity", "linear"])
def test_a_shortened_head_says_the_same_of_its_factors(loaded, kind):
    config = dataclasses.replace(loaded.head_config, predicted=4, transition=kind)
    weights = head.init(jax.random.key(0), config, loaded.model)
    own, short = tune.shortened(config, weights, 3)
    assert jax.tree.map(np.shape, short) == jax.tree.map(
        np.shape, head.init(jax.random.key(0), own, loaded.model)
    )
    table = transformer.unembedding(loaded.model, loaded.params)
    states = jax.random.normal(jax.random.key(1), (1, loaded.model.embed_dim))
    for step in range(3):
        whole, part = (
            head.log_probs(p, c, states, step, table) for p, c in ((weights, config), (short, own))
        )
        np.testing.assert_array_equal(whole, part)
    assert head.transition(short, own, states, 2) is None
    with pytest.raises(ValueError, match="5 factors of a head that has 4"):
        tune.shortened(config, weights, 5)


def test_the_best_length_of_each_head_is_timed_first():
    rows = [
        {"checkpoint": name, "n": n, "expected_tokens_per_call": value}
        for name, n, value in [("a", 2, 1.5), ("a", 3, 1.7), ("b", 2, 1.2), ("b", 3, 1.1)]
    ]
    chosen = [(row["checkpoint"], row["n"]) for row in tune.candidates(rows, 3)]
    assert chosen == [("a", 3), ("b", 2), ("a", 2)]


def test_tuning_keeps_the_fastest_with_what_it_was_measured_on(config, folder, loaded, monkeypatch):
    monkeypatch.setattr(checkpoints, "load", lambda path, config: loaded)
    speeds = iter([100.0, 150.0, 120.0])
    measured = {"tokens_per_call": 1.5, "batch": 1, "tokens": 9, "temperature": 1.0}
    monkeypatch.setattr(tune, "measure", lambda *_: measured | {"tokens_per_s": next(speeds)})
    row = {"rank": 2, "transition": "identity", "method": "cp r2", "temperature": 1.0}
    rows = [{**row, "checkpoint": "run", "n": n, "expected_tokens_per_call": 1 + n} for n in (2, 3)]
    monkeypatch.setattr(evaluate, "run", lambda *_: {"rows": rows})
    workdir = Workdir(folder / "tune")
    result = tune.run(config, workdir, [folder / "run"])
    assert [row["speedup"] for row in result["rows"]] == [1.0, 1.5, 1.2]
    tuned = tune.load(folder / "tune")
    assert (tuned.checkpoint, tuned.n, tuned.speedup) == ("run", 3, 1.5)
    assert result["chosen"] == dataclasses.asdict(tuned)
    assert tuned.differences(tune.hashes_of(loaded.setup, loaded.params)) == []
    other = jax.tree.map(lambda x: 2 * x, loaded.params)
    assert tuned.differences(tune.hashes_of(loaded.setup, other)) == ["model"]
    assert tune.apply(tuned, loaded).head_config == loaded.head_config
    assert tune.apply(dataclasses.replace(tuned, n=2), loaded).head_config.predicted == 2
    with pytest.raises(UserError, match="tuned for a head of rank 3"):
        tune.apply(dataclasses.replace(tuned, rank=3), loaded)


def test_a_choice_for_another_model_says_so(loaded, capsys):
    hashes = tune.hashes_of(loaded.setup, loaded.params) | {"template": "another"}
    tuned = tune.Tuned("run", 2, "identity", 2, 1.0, 1.0, hashes)
    tune.apply(tuned, loaded)
    assert "tuned for another template" in capsys.readouterr().err


def test_tune_refusals(config, folder):
    with pytest.raises(UserError, match="--ranks=0 must be at least 1"):
        tune.Options(ranks=(0,))
    with pytest.raises(UserError, match="--transitions='cyclic' is not one of"):
        tune.Options(transitions=("cyclic",))
    with pytest.raises(UserError, match="give one --checkpoint"):
        tune.run(config, Workdir(folder / "two"), [folder, folder], tune.Options(ranks=(1,)))
    with pytest.raises(UserError, match=r"tune writes it"):
        tune.load(folder / "nowhere.json")
    (folder / "odd.json").write_text("{}")
    with pytest.raises(UserError, match="not what experiments"):
        tune.load(folder / "odd.json")


# --- figures

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
    tree = {**auto, "method": "cp r4 n4 tree3", "transition": "identity+tree", "chains": 3}
    path.write_text("\n".join(json.dumps(row) for row in [*ROWS, auto, big, tree, ROWS[-1]]))
    rows = figures.gather([path])
    assert len(rows) == len(ROWS) + 3
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
    texts = {text.get_text() for text in drawn["speed_t1"].axes[0].texts}
    assert "autoregressive" in texts
    assert "cp r4 n4 tree3" not in texts
    saved = figures.save(drawn, folder / "plots")
    assert len(saved) == 2
    assert (folder / "plots" / "speed_t1_by_rank.png").read_bytes().startswith(b"\x89PNG")
    assert plots.colour("cp n=4") != plots.colour("hmm n=4")
