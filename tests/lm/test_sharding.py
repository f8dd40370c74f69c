# SPDX-License-Identifier: Apache-2.0
"""Rules, refusals, and the claim that matters: one device and four give the same training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lm import losses, sharding, train, transformer
from lm.config import LoraConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from lm.errors import UserError

MODEL = ModelConfig(
    vocab_size=64, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24
)


def rows(count=8, length=24):
    """Rows with two documents each, several edges from some rows, and padding."""
    rng = np.random.default_rng(0)
    half = length // 2
    until = np.where(np.arange(length) < half, half, length - 2)
    until[length - 2 :] = 0
    edges = np.tile(np.arange(length), (count, 1))
    edges[:, 3] = 2
    targets = rng.integers(0, 50, (count, length))
    targets[:, length - 3 :] = -1
    batch = {
        "tokens": rng.integers(0, 50, (count, length)),
        "positions": np.tile(np.arange(length) % half, (count, 1)),
        "until": np.tile(until, (count, 1)),
        "edge_rows": edges,
        "edge_targets": targets,
    }
    batch = {name: x.astype(np.int32) for name, x in batch.items()}
    weights = np.where(targets >= 0, rng.uniform(0.5, 2, targets.shape), 0).astype(np.float32)
    return batch | {"edge_weights": weights, "edge_turn_weights": weights / 7}


def train_steps(mesh_config, accumulate=1, model=MODEL, count=3):
    """Losses and gradient norms of a few steps, and the parameters after them."""
    devices = jax.devices()
    if mesh_config == MeshConfig(1, 1, 1):
        devices = devices[:1]
    mesh = sharding.make(mesh_config, model, devices)
    optimizer = train.make_optimizer(OptimizerConfig(warmup_steps=1), 10)
    execution = losses.Execution(mesh, valid_vocab=50)
    objective = train.edge_objective(model, execution, "per_token")
    config = TrainConfig(batch_size=8, accumulate=accumulate)
    step = jax.jit(train.make_step(objective, optimizer, config, "float32"))
    trained, frozen = train.partition(model, transformer.init(model, jax.random.key(0)))
    if mesh is not None:
        trained, frozen = (jax.device_put(x, mesh.params(x)) for x in (trained, frozen))
    state = train.init_state(trained, optimizer, 0, mesh)
    seen = []
    for _ in range(count):
        state, sums = step(state, frozen, train.to_device(rows(), mesh))
        seen.append([*train.mean_losses(sums).values(), float(sums["grad_norm"])])
    return np.array(seen), jax.device_get(state.params)


@pytest.fixture(scope="module")
def single():
    return train_steps(MeshConfig(1, 1, 1))


@pytest.mark.parametrize("axes", [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)])
def test_four_devices_train_like_one(axes, single):
    seen, params = train_steps(MeshConfig(*axes))
    np.testing.assert_allclose(seen, single[0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, single[1])


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 1, 2)])
def test_accumulation_is_the_whole_batch(axes, single):
    seen, _ = train_steps(MeshConfig(*axes), accumulate=4 if axes == (1, 1, 1) else 2)
    np.testing.assert_allclose(seen, single[0], atol=1e-5)


def test_adapters_train_alone_and_shard():
    lora = ModelConfig(**{**vars(MODEL), "lora": LoraConfig(rank=2)})
    alone, adapters = train_steps(MeshConfig(1, 1, 1), model=lora)
    names = {path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(adapters)[0]}
    assert names == {"lora_a", "lora_b"}
    assert alone[-1, 0] < alone[0, 0]
    shared, _ = train_steps(MeshConfig(1, 2, 2), model=lora)
    np.testing.assert_allclose(shared, alone, atol=1e-5)


def test_specs_follow_one_table():
    mesh = sharding.make(MeshConfig(1, 2, 2), MODEL)
    specs = jax.tree.map(lambda s: s.spec, mesh.params(transformer.abstract(MODEL)[1]))
    assert specs["layers"]["attention"]["q"]["kernel"] == P(None, ("fsdp",), ("tensor",), None)
    assert specs["layers"]["mlp"]["down"]["kernel"] == P(None, ("tensor",), ("fsdp",))
    assert specs["unembed"]["table"] == P(("tensor",), ("fsdp",))
    assert specs["final_norm"]["scale"] == P(None)
    shapes = jax.eval_shape(transformer.unstacked, transformer.abstract(MODEL)[1])
    last = mesh.params(shapes)["layers"][-1]
    assert last["attention"]["q"]["kernel"].spec == P(("fsdp",), ("tensor",), None)
    with pytest.raises(ValueError, match="twice"):
        mesh.spec("heads", "mlp")


@pytest.mark.parametrize(
    ("axes", "model", "message"),
    [
        ((3, 1, 1), MODEL, "does not cover 4 device"),
        ((-1, -1, 1), MODEL, "at most one -1"),
        ((0, 4, 1), MODEL, "must be positive"),
        ((1, 1, 4), MODEL, "mesh.tensor=4 does not divide num_kv_heads=2"),
    ],
)
def test_bad_meshes_are_refused(axes, model, message):
    with pytest.raises(UserError, match=message):
        sharding.make(MeshConfig(*axes), model)


def test_a_dimension_that_does_not_divide_is_refused():
    odd = ModelConfig(**{**vars(MODEL), "embed_dim": 18})
    mesh = sharding.make(MeshConfig(1, 4, 1), odd)
    with pytest.raises(UserError, match="dimension embed of size 18 does not divide over 4"):
        mesh.params(transformer.abstract(odd)[1])


def test_padding_vocabulary_is_outside_the_softmax():
    params = transformer.init(MODEL, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, rows(2))
    log_probs = losses.edge_log_probs(MODEL, params, batch, losses.Execution(valid_vocab=50))
    states = losses.forward(MODEL, params, batch, losses.Execution())
    x = np.take_along_axis(np.asarray(states), rows(2)["edge_rows"][..., None], 1)
    logits = np.asarray(transformer.logits(MODEL, params, x))[..., :50]
    expected = jax.nn.log_softmax(logits)
    targets = rows(2)["edge_targets"]
    picked = np.take_along_axis(np.asarray(expected), targets.clip(0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_probs, np.where(targets >= 0, picked, 0), atol=1e-5)
