# SPDX-License-Identifier: Apache-2.0
"""The whole comparison on a tiny target: every stage, in pieces, and what it leaves behind."""

import dataclasses

import jax
import pytest

from lm.config import DataConfig, ModelConfig, SamplingConfig, TrainConfig
from lm.cp_heads import study, study_decode, together
from lm.cp_heads.baselines import Hydra
from lm.cp_heads.config import CpConfig, StudyConfig
from lm.cp_heads.head import HeadConfig
from lm.errors import UserError
from lm.workdir import Workdir

# the shape that the small model gets, too: programs are compiled once
SHAPE = {
    "num_layers": 1, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8,
    "mlp_dim": 48,
}  # fmt: skip
STUDY = StudyConfig(
    ranks=(1, 2), lengths=(2,), temperatures=(0.0,), head_steps=2, head_batch=2, draft_layers=1,
    draft_dim=16, draft_steps=1, prompt_tokens=4, new_tokens=4, repeats=1, batches=(),
    check_tokens=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def config(folder):
    tree = folder / "tree"
    tree.mkdir()
    for i in range(8):
        lines = (f"name_{i * j} = {j} + len(names[{i}])\n" for j in range(4))
        (tree / f"file{i}.py").write_text("".join(lines))
    return CpConfig(
        model=ModelConfig(**SHAPE),
        head=HeadConfig(expander_rank=4),
        data=DataConfig(
            f"python:{tree}", seq_len=48, validation_fraction=0.5, eval_conversations=4
        ),
        train=TrainConfig(batch_size=4, steps=1),
        sampling=SamplingConfig(max_new_tokens=6),
        study=STUDY,
    )


def test_stages_come_in_their_order(config, folder, monkeypatch):
    workdir = Workdir(folder / "empty")
    for stage in ("heads", "offline", "decode", "check"):
        with pytest.raises(UserError, match="--stage=trunk comes first"):
            study.run(config, workdir, stage)
    monkeypatch.setattr(study, "_require", lambda *_: None)
    with pytest.raises(UserError, match="--stage=offline comes first"):
        study.run(config, workdir, "decode")
    with pytest.raises(UserError, match=r"--minutes=0 must be above 0"):
        study.run(config, workdir, "all", 0)


@pytest.mark.slow
def test_a_study_in_pieces(config, folder, monkeypatch):
    # Hydra and the draft model are timed in test_baselines
    heads = ["cp r2 n2", "hmm_linear r2 n2"]
    methods = ("autoregressive", "rank1", *heads)
    block = study_decode.Block("n2 t0 best", 2, 0.0, 1, methods)
    monkeypatch.setattr(study_decode, "blocks", lambda *_: [block])
    workdir = Workdir(folder / "run")
    found = study.run(config, workdir, "all", 1e-9)
    assert (found["stage"], found["done"], found["rows"]) == ("trunk", False, 0)
    assert study.run(config, workdir, "trunk")["done"]
    found = study.run(config, workdir)
    assert (found["stage"], found["done"]) == ("check", True)
    rows = {name: workdir.rows(name) for name in ("eval.jsonl", "benchmark.jsonl")}
    for row in (*rows["eval.jsonl"], *rows["benchmark.jsonl"]):
        assert {"command", "commit", "device", "date"} <= row.keys()
    trainings = [row["method"] for row in rows["eval.jsonl"] if row["kind"] == "training"]
    assert trainings == ["trunk", "draft", "heads"]
    acceptance = found["summary"]["acceptance"]["n2 t0"]
    assert acceptance.keys() == {"cp r1", "cp r2", "hmm r2"}
    assert all(1 <= value <= 2 for value in acceptance.values())
    timed = [row["method"] for row in rows["benchmark.jsonl"]]
    assert timed == list(methods)
    best = found["summary"]["fastest"]["n2 t0"]
    speeds = {row["method"]: row["tokens_per_s"] for row in rows["benchmark.jsonl"]}
    fastest = max(speeds[name] for name in heads)
    assert best["over_rank1"] == pytest.approx(fastest / speeds["rank1"])
    assert best["baselines"].keys() == {"autoregressive", "rank1"}
    assert found["summary"]["greedy_mismatches"] == 0
    assert found["summary"]["tokens_checked"] >= 4
    assert len(found["plots"]) == 2
    other = dataclasses.replace(config, study=dataclasses.replace(STUDY, ranks=(1, 4)))
    with pytest.raises(UserError, match=r"heads of study.ranks=\(1, 2\), the config says \(1, 4\)"):
        study.run(other, workdir)
    # what is finished is not done again
    monkeypatch.setattr(study, "target_of", lambda _: pytest.fail("measured again"))
    monkeypatch.setattr(study.training, "run", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(study.together, "run", lambda *_: pytest.fail("trained again"))
    again = study.run(config, workdir)
    assert (again["done"], again["rows"]) == (True, found["rows"])


def test_heads_of_a_study(config):
    wide = dataclasses.replace(STUDY, ranks=(4, 1, 2), lengths=(3, 5), hmm="constant")
    model = dataclasses.replace(config.model, vocab_size=64)
    members = study.members_of(dataclasses.replace(config, model=model, study=wide))
    assert list(members) == [
        "cp r2 n3", "hmm r2 n3", "cp r4 n3", "hmm r4 n3", "hydra n3",
        "cp r1 n5", "cp r2 n5", "hmm r2 n5", "cp r4 n5", "hmm r4 n5", "hydra n5",
    ]  # fmt: skip
    made = jax.eval_shape(lambda key: together.init(key, members, model), jax.random.key(0))
    size = {name: sum(x.size for x in jax.tree.leaves(one)) for name, one in made.items()}
    assert isinstance(members["hydra n5"], Hydra)
    assert 0.8 < size["hydra n5"] / size["cp r4 n5"] <= 1


def row_of(rank, transition, n, temperature, value):
    name = f"{transition} r{rank} n{n}"
    return {
        "kind": "acceptance", "head": name, "rank": rank, "transition": transition, "n": n,
        "temperature": temperature, "expected_tokens_per_call": value,
    }  # fmt: skip


def test_the_best_heads_are_timed_first():
    rows = [
        row_of(rank, kind, 4, t, 1 + rank / 10 + (0.5 if kind == "linear" and t else 0.0))
        for kind in ("identity", "linear")
        for rank in (1, 2, 4)[kind == "linear" :]
        for t in (0.0, 1.0)
    ]
    options = StudyConfig(ranks=(1, 2, 4), lengths=(4,), batches=(8,))
    blocks = study_decode.blocks(options, rows)
    assert [block.name for block in blocks] == [
        "n4 t0 best", "n4 t1 best", "n4 t0 ranks", "n4 t1 ranks", "n4 t0 batch8",
    ]  # fmt: skip
    best = ("identity r4 n4", "linear r4 n4")
    assert blocks[0].methods == ("autoregressive", "rank1", *best, "hydra", "draft_model")
    assert blocks[2].methods == ("autoregressive", "rank1", "identity r2 n4", "linear r2 n4")
    assert (blocks[4].batch, blocks[4].methods) == (8, ("autoregressive", "rank1", *best))
    assert study_decode.finalists(options, rows) == list(best)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ranks": (2, 4)}, "study.ranks needs 1"),
        ({"ranks": (1,)}, "study.ranks needs 1"),
        ({"ranks": (0, 1, 2)}, "study.ranks=0"),
        ({"lengths": (1,)}, "predicts at least 2 tokens"),
        ({"hmm": "identity"}, "study.hmm='identity' is not one of"),
        ({"temperatures": (-1.0,)}, "study.temperatures"),
        ({"check_tokens": 0}, "study.check_tokens=0"),
    ],
)
def test_refusals(changes, reason):
    with pytest.raises(UserError, match=reason):
        dataclasses.replace(STUDY, **changes)
