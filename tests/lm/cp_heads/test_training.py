# SPDX-License-Identifier: Apache-2.0
"""Runs with a CP head: what each mode trains, resuming bit for bit, meshes, metrics, refusals."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import losses, sharding, train
from lm.config import (
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from lm.cp_heads import checkpoints, futures, training
from lm.cp_heads.config import CpConfig
from lm.cp_heads.head import HeadConfig
from lm.cp_heads.losses import LossConfig
from lm.data import documents, packing
from lm.errors import UserError
from lm.hf import weights
from lm.workdir import Workdir

MODEL = ModelConfig(
    vocab_size=64, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24
)
HEAD = HeadConfig(2, 2, "linear", expander_rank=4)


def rows():
    """Eight rows of two documents and some padding."""
    rng = np.random.default_rng(0)
    pieces = [documents.chain(rng.integers(0, 50, 11).astype(np.int32)) for _ in range(16)]
    made = packing.pack(pieces, 24)
    assert len(made) == 8
    return packing.stack(made)


def train_steps(axes, config, count=3, accumulate=1):
    """Metrics of a few steps, what was trained before them, and after."""
    devices = jax.devices() if math.prod(axes) > 1 else jax.devices()[:1]
    mesh = sharding.make(MeshConfig(*axes), config.model, devices)
    execution = losses.Execution(mesh, valid_vocab=50)
    objective = training.objective(config.model, config.head, config.loss, execution)
    # an eps above rounding noise: Adam would make full steps of gradients that are but noise
    schedule = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, eps=1e-4)
    optimizer = train.make_optimizer(schedule, 10)
    options = TrainConfig(batch_size=8, accumulate=accumulate)
    step = jax.jit(train.make_step(objective, optimizer, options, "float32"))
    params, frozen = parts(config)
    if mesh is not None:
        params, frozen = (jax.device_put(x, mesh.params(x)) for x in (params, frozen))
    state = train.init_state(params, optimizer, 0, mesh)
    batch = train.to_device(futures.with_futures(rows(), config.head.predicted), mesh)
    seen = []
    for _ in range(count):
        state, sums = step(state, frozen, batch)
        seen.append([*training.metrics(sums).values(), float(sums["grad_norm"])])
    return np.array(seen), params, jax.device_get(state.params)


def parts(config):
    """(trained, frozen) random parameters of a config, in the structure of a run's."""
    rng = np.random.default_rng(0)

    def leaf(x):
        if x.dtype == jnp.int32:
            return np.arange(x.size, dtype=np.int32)
        return (0.3 * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree.map(leaf, (training.abstract_trained(config), training.abstract_frozen(config)))


def config_of(mode="joint", head_config=HEAD, rank=0, **options):
    model = dataclasses.replace(MODEL, lora=LoraConfig(rank=rank))
    return CpConfig(model=model, head=head_config, loss=LossConfig(mode=mode, **options))


JOINT = config_of(distill=0.3, balance=0.0)


@pytest.fixture(scope="module")
def joint():
    return train_steps((1, 1, 1), JOINT)


def test_the_head_learns_with_the_model(joint):
    seen, before, after = joint
    assert seen[-1, 0] < seen[0, 0]
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    assert all(jax.tree.leaves(changed))


def test_four_devices_and_microbatches_train_like_one_device(joint):
    """Without the balance term, which is of each microbatch's own average."""
    seen, _, params = train_steps((2, 1, 2), JOINT, accumulate=2)
    np.testing.assert_allclose(seen, joint[0], atol=2e-5, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, joint[2])


def test_four_devices_with_a_draft_vocabulary_on_a_frozen_trunk():
    config = config_of("heads", HeadConfig(2, 2, expander_rank=4, draft_vocab=22), balance=0.5)
    alone = train_steps((1, 1, 1), config)
    shared = train_steps((1, 2, 2), config)
    np.testing.assert_allclose(shared[0], alone[0], atol=2e-5, rtol=1e-5)


def test_adapters_of_the_last_layers_only():
    seen, before, after = train_steps((1, 1, 1), config_of("lora", rank=2, lora_layers=1))
    assert seen[-1, 0] < seen[0, 0]
    flat = jax.tree_util.tree_leaves_with_path(after["params"])
    assert {path[-1].key for path, _ in flat} == {"lora_a", "lora_b"}
    for (path, new), old in zip(flat, jax.tree.leaves(before["params"]), strict=True):
        moved = [bool(np.any(n != o)) for n, o in zip(new, old, strict=True)]
        assert moved == [False, True], path


def test_metrics_of_known_sums():
    sums = {
        "objective": jnp.float32(8),
        "tokens": jnp.float32(4),
        "next_token": jnp.float32(2),
        "head_weight": jnp.float32(4),
        "head_nll": jnp.array([4.0, 3.0]),
        "head_count": jnp.array([4.0, 2.0]),
        "gate": jnp.array([3.0, 1.0]),
        "gate_entropy": jnp.float32(2),
        "posterior_entropy": jnp.float32(1),
    }
    effective = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert training.metrics(sums) == pytest.approx(
        {
            "loss_per_token": 2.0,
            "next_token": 0.5,
            "head": 1.75,
            "head_1": 1.0,
            "head_2": 1.5,
            "gate_effective": effective,
            "gate_largest": 0.75,
            "gate_entropy": 0.5,
            "posterior_entropy": 0.25,
        }
    )


# --- whole runs


def run_config(mode, steps, init_from="", **changes):
    model = dataclasses.replace(MODEL, vocab_size=0, num_layers=1)
    values = {
        "model": model,
        "data": DataConfig(seq_len=64, limit=20, eval_conversations=4),
        "train": TrainConfig(batch_size=4, steps=steps, checkpoint_every=2, log_every=1),
        "head": HeadConfig(2, 2, "constant", expander_rank=4, draft_vocab=60),
        "loss": LossConfig(mode=mode),
        "init_from": str(init_from),
    }
    return CpConfig(**{**values, **changes})


def run(config, workdir):
    return training.run(config, Workdir(workdir))


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "trunk"
    run(run_config("trunk", 2), workdir)
    return workdir


@pytest.fixture(scope="module")
def heads(trunk):
    workdir = trunk.parent / "heads"
    loss = LossConfig(mode="heads", fraction=0.5)
    return workdir, run(run_config("heads", 4, trunk, loss=loss), workdir)


def test_a_run_goes_on_bit_for_bit(heads, tmp_path):
    workdir, whole = heads
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    again = run(Workdir(copy).config(CpConfig), copy)
    assert (again.step, again.loss) == (whole.step, whole.loss)
    same = train.params_sha256(again.state.params) == train.params_sha256(whole.state.params)
    assert same
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    (kept,) = (json.loads(file.read_text()) for file in (copy / "checkpoints/2/meta").iterdir()
               if file.is_file() and file.name == "metadata")  # fmt: skip
    assert 0 < kept["seconds"] < again.seconds  # those of the first process count
    finished = run(Workdir(copy).config(CpConfig), copy)
    assert kept["seconds"] < finished.seconds <= again.seconds
    wanted = {"head", "head_1", "head_2", "gate_effective", "gate_largest", "posterior_entropy"}
    assert wanted <= rows[-1].keys()


def test_a_frozen_trunk_is_read_from_where_it_was(trunk, heads):
    loaded = checkpoints.load(heads[0])
    _, params, none = checkpoints.load_run(trunk)
    assert none is None
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    stored = {name: loaded.head[name] for name in heads[1].state.params["head"]}
    jax.tree.map(np.testing.assert_array_equal, stored, heads[1].state.params["head"])
    ids = np.asarray(loaded.head["vocab"]["ids"])
    assert len(ids) == 60
    assert (np.diff(ids) > 0).all()


def test_a_head_that_goes_on_keeps_its_draft_vocabulary(heads, tmp_path):
    others = DataConfig(seq_len=64, limit=20, eval_conversations=4, seed=7, max_operand=9)
    loss = LossConfig(mode="heads", fraction=0.5)
    short = TrainConfig(batch_size=4, steps=1, checkpoint_every=2)
    run(run_config("heads", 0, heads[0], loss=loss, data=others, train=short), tmp_path)
    before, after = (checkpoints.read_draft_vocab(path) for path in (heads[0], tmp_path))
    np.testing.assert_array_equal(before, after)


def test_joint_runs_start_from_both_and_hold_both(heads, tmp_path, capsys):
    config = run_config("joint", 1, heads[0])
    result = run(config, tmp_path / "joint")
    assert f"the head starts as that of {heads[0]}" in capsys.readouterr().err
    assert result.state.params.keys() == {"params", "head"}
    loaded = checkpoints.load(tmp_path / "joint")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, result.state.params["params"])
    assert loaded.head_config == config.head


def test_a_run_attaches_to_the_directory_of_its_model_only(trunk, heads, tmp_path):
    loaded = checkpoints.load(heads[0])
    export = tmp_path / "export"
    weights.save(export, loaded.model, loaded.params, tokenizer=loaded.setup.tokenizer)
    result = checkpoints.attach_run(export, heads[0], export)
    assert result["trained"]
    again = checkpoints.load(export)
    jax.tree.map(np.testing.assert_array_equal, again.head, loaded.head)
    other = jax.tree.map(lambda x: x + 1, loaded.params)
    weights.save(tmp_path / "other", loaded.model, other, tokenizer=loaded.setup.tokenizer)
    with pytest.raises(UserError, match="trained other weights than those of"):
        checkpoints.attach_run(tmp_path / "other", heads[0], tmp_path / "other")
    with pytest.raises(UserError, match="has no CP head"):
        checkpoints.attach_run(export, trunk, export)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head": HeadConfig(rank=0)}, "head.rank=0 must be at least 1"),
        ({"head": HeadConfig(predicted=64)}, "head.predicted=64 tokens do not fit rows"),
        ({"loss": LossConfig("lora")}, "loss.mode=lora needs model.lora.rank"),
        ({"train": TrainConfig(weighting="per_turn")}, "train.weighting must be per_token"),
        (
            {"model": dataclasses.replace(MODEL, vocab_size=0, lora=LoraConfig(rank=2))},
            "loss.mode=joint has no adapters",
        ),
        ({"model": dataclasses.replace(MODEL, vocab_size=40)}, "tokens, the model only 40"),
        ({"head": HeadConfig(draft_vocab=999)}, "head.draft_vocab=999 is not between"),
    ],
)
def test_wrong_settings_are_one_line(changes, reason, tmp_path):
    with pytest.raises(UserError, match=reason) as error:
        run(run_config("joint", 1, **changes), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("size", "reason"),
    [(600, "600 tokens, the model only 384"), (360, "other tokens than that of")],
)
def test_a_checkpoint_of_another_vocabulary_is_one_line(size, reason, trunk, tmp_path):
    words = np.random.default_rng(0).integers(97, 123, (500, 8)).astype(np.uint8)
    (tmp_path / "a.py").write_bytes(b"\n".join(bytes(word) for word in words))
    data = DataConfig(f"python:{tmp_path}", f"bpe:{size}", seq_len=64, validation_fraction=0.0)
    with pytest.raises(UserError, match=reason) as error:
        run(run_config("heads", 1, trunk, data=data), tmp_path / "run")
    assert "\n" not in str(error.value)
