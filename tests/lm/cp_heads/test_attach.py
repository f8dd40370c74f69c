# SPDX-License-Identifier: Apache-2.0
"""Heads beside Hugging Face checkpoints of every family: nothing of theirs changes, all of ours
comes back, and a head on the wrong model is one line."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from lm import transformer, tuned
from lm.config import DataConfig, ModelConfig, TrainConfig
from lm.cp_heads import attach, checkpoints, head
from lm.cp_heads.config import CpConfig
from lm.cp_heads.head import HeadConfig
from lm.errors import UserError
from lm.hf import families, weights

HEAD = HeadConfig(2, 3, "linear", expander_rank=3, draft_vocab=7)


def checkpoint(folder, family=families.FAMILIES[0], vocab=300):
    """A tiny checkpoint of random weights that a byte tokenizer fits."""
    model = ModelConfig(
        vocab_size=vocab, num_layers=2, embed_dim=12, num_heads=2, num_kv_heads=1, head_dim=6,
        mlp_dim=10, **family.implied,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = transformer.abstract(model)[1]
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    weights.save(folder, model, params)
    return folder


def run_config(head_config=HEAD, seed=1):
    data = DataConfig(tokenizer="bytes")
    return CpConfig(head=head_config, data=data, train=TrainConfig(seed=seed))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_attach_and_load_back(family, tmp_path):
    base = checkpoint(tmp_path / "base", family)
    before = files(base)
    result = checkpoints.attach_random(base, run_config(), base)
    after = files(base)
    assert {name: after.pop(name) for name in before} == before
    assert after.keys() == {attach.WEIGHTS, attach.FIELDS}
    loaded = checkpoints.load(base, run_config(HeadConfig()))
    assert loaded.head_config == HEAD
    model, params = weights.load(base)
    assert loaded.model.vocab_size == model.vocab_size
    same(loaded.params, params)
    same(loaded.head, head.init(jax.random.key(1), HEAD, model))
    assert result == {
        "head": str(base / attach.WEIGHTS),
        "rank": 2,
        "predicted": 3,
        "parameters": sum(x.size for x in jax.tree.leaves(loaded.head)),
        "trained": False,
    }


def test_a_directory_of_its_own(tmp_path):
    base = checkpoint(tmp_path / "base")
    before = files(base)
    checkpoints.attach_random(base, run_config(), tmp_path / "heads" / "r2")
    assert files(base) == before
    same(
        checkpoints.load(tmp_path / "heads" / "r2", run_config()).head,
        head.init(jax.random.key(1), HEAD, weights.read_config(base)),
    )
    assert checkpoints.head_of(base) is None


@pytest.fixture
def attached(tmp_path):
    base = checkpoint(tmp_path / "base")
    checkpoints.attach_random(base, run_config(), base)
    return base


def refusal(path):
    with pytest.raises(UserError) as error:
        checkpoints.load(path, run_config())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_head(tmp_path):
    assert "has no CP head; attach one" in refusal(checkpoint(tmp_path / "base"))


def test_other_weights(attached):
    (file,) = attached.glob("model*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    assert "was made for other weights" in refusal(attached)


def test_another_vocabulary(attached, tmp_path):
    other = checkpoint(tmp_path / "other", vocab=320)
    for name in (attach.WEIGHTS, attach.FIELDS):
        (other / name).write_bytes((attached / name).read_bytes())
    assert "is for a vocabulary of 300 tokens, the model has 320" in refusal(other)


def test_parameters_of_another_shape(attached):
    tensors = safetensors.numpy.load_file(attached / attach.WEIGHTS)
    tensors["expander.up"] = tensors["expander.up"][..., :5].copy()
    safetensors.numpy.save_file(tensors, attached / attach.WEIGHTS)
    assert "expander/up has shape [3, 2, 3, 5]" in refusal(attached)


def test_a_smaller_vocabulary_than_the_tokenizer(tmp_path):
    base = checkpoint(tmp_path / "base", vocab=40)
    checkpoints.attach_random(base, run_config(), base)
    assert "tokens, the model only 40" in refusal(base)


def test_damaged_files(attached):
    (attached / attach.WEIGHTS).write_bytes(b"nothing")
    assert "not a whole safetensors file" in refusal(attached)
    (attached / attach.FIELDS).write_text(json.dumps({"head": {"rnk": 2}}))
    assert "unknown config key head.rnk; did you mean head.rank?" in refusal(attached)
    (attached / attach.FIELDS).write_text("{")
    assert "not a description of a CP head" in refusal(attached)


def test_the_digest_outlives_a_change_of_dtype(tmp_path):
    base = checkpoint(tmp_path / "base")
    model, params = weights.load(base)
    weights.save(tmp_path / "half", model, params, dtype="bfloat16")
    assert tuned.digest(weights.load(tmp_path / "half")[1]) == tuned.digest(params)
