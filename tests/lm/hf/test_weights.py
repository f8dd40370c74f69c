# SPDX-License-Identifier: Apache-2.0
"""Checkpoint directories: exact round trips, files of every kind, clear errors, resized tables."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lm import transformer
from lm.config import ModelConfig
from lm.errors import UserError
from lm.hf import embeddings, families, parity, weights
from lm.text import tokenizers

GOLDEN = Path(__file__).parents[2] / "golden" / "hf"
NAMES = ("gemma", "llama", "llama3", "qwen2", "qwen2_yarn", "qwen3")
DTYPES = ("float32", "bfloat16", "float16")


def _tensors(folder):
    files = sorted(Path(folder).glob("*.safetensors"))
    return {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}


def _equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def _random(family, tied=False, dtype="float32"):
    """A config with all sizes different, and parameters in the model's own structure."""
    config = ModelConfig(
        vocab_size=40, num_layers=3, embed_dim=20, num_heads=4, num_kv_heads=2, head_dim=6,
        mlp_dim=14, tied_embeddings=tied, **family.implied,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = transformer.abstract(config)[1]
    return config, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(jnp.dtype(dtype)), shapes)


@pytest.fixture
def llama(tmp_path):
    """A copy of a checkpoint to break."""
    return Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))


def _rewrite(folder, change):
    tensors = _tensors(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_golden_tensors_survive_a_round_trip(name, tmp_path):
    config, params = weights.load(GOLDEN / name)
    family = families.of_fields(weights.read_fields(GOLDEN / name), name)
    weights.save(tmp_path, config, params, family.name, shard_bytes=60_000)
    before, after = _tensors(GOLDEN / name), _tensors(tmp_path)
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        assert after[tensor].dtype == value.dtype
        np.testing.assert_array_equal(after[tensor], value)
    again_config, again = weights.load(tmp_path)
    assert again_config == config
    _equal(again, params)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda f: f.name)
def test_save_then_load(family, tied, tmp_path):
    """Also says that the tables cover exactly the parameters that the model has."""
    config, params = _random(family, tied)
    weights.save(tmp_path, config, jax.tree.map(jnp.asarray, params))
    loaded_config, loaded = weights.load(tmp_path)
    assert loaded_config == config
    _equal(loaded, params)
    assert ("lm_head.weight" in _tensors(tmp_path)) != tied


def test_values_land_where_they_belong(tmp_path):
    """The matrices of the checkpoint are [out, in], heads outermost on the head side."""
    config, params = _random(families.named("qwen2"))
    weights.save(tmp_path, config, params)
    there, attention = _tensors(tmp_path), params["layers"]["attention"]
    H = config.head_dim
    q = there["model.layers.2.self_attn.q_proj.weight"]
    assert q[3 * H + 1, 7] == attention["q"]["kernel"][2, 7, 3, 1]
    v = there["model.layers.0.self_attn.v_proj.bias"]
    assert v[1 * H + 5] == attention["v"]["bias"][0, 1, 5]
    o = there["model.layers.1.self_attn.o_proj.weight"]
    assert o[7, 2 * H + 3] == attention["o"]["kernel"][1, 2, 3, 7]
    assert (
        there["model.layers.1.mlp.up_proj.weight"][9, 3]
        == (params["layers"]["mlp"]["up"]["kernel"][1, 3, 9])
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, tmp_path):
    config, params = _random(families.named("qwen3"), dtype=dtype)
    weights.save(tmp_path / "same", config, params)
    assert weights.read_fields(tmp_path / "same")["dtype"] == dtype
    _equal(weights.load(tmp_path / "same")[1], params)

    wide = jax.tree.map(lambda x: x.astype(np.float32), params)
    _equal(weights.load(tmp_path / "same", dtype="float32")[1], wide)
    weights.save(tmp_path / "cast", config, wide, dtype=dtype)
    _equal(weights.load(tmp_path / "cast")[1], params)


def test_layers_of_different_dtypes_become_float32(llama):
    name = "model.layers.1.mlp.up_proj.weight"
    expected = weights.load(llama)[1]["layers"]["mlp"]["up"]["kernel"]

    def narrow(tensors):
        tensors[name] = tensors[name].astype(jnp.bfloat16)

    _rewrite(llama, narrow)
    loaded = weights.load(llama)[1]["layers"]["mlp"]["up"]["kernel"]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded[0], expected[0])
    np.testing.assert_array_equal(loaded[1], expected[1].astype(jnp.bfloat16).astype(np.float32))


def test_shards(tmp_path):
    config, params = _random(families.named("llama"))
    weights.save(tmp_path, config, params, shard_bytes=4000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert not list(tmp_path.glob("*.tmp"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    for name, file in index["weight_map"].items():
        assert name in safetensors.numpy.load_file(tmp_path / file)
    for file in files:
        tensors = safetensors.numpy.load_file(file)
        assert sum(x.nbytes for x in tensors.values()) <= 4000 or len(tensors) == 1
    _equal(weights.load(tmp_path)[1], params)


def test_place_takes_each_parameter_when_it_is_whole():
    seen = []

    def place(path, array):
        seen.append(path)
        return jnp.asarray(array)

    config, params = weights.load(GOLDEN / "qwen3", place=place)
    assert len(seen) == len(set(seen)) == len(jax.tree.leaves(params))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
    assert params["layers"]["attention"]["q_norm"]["scale"].shape == (2, config.head_dim)


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _set(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_drop("model.norm.weight"), "missing tensor model.norm.weight"),
        (_drop("lm_head.weight"), "missing tensor lm_head.weight"),
        (_set("model.layers.0.self_attn.q_proj.bias", np.zeros(48, np.float32)),
         "unexpected tensor model.layers.0.self_attn.q_proj.bias"),
        (_set("model.layers.2.mlp.up_proj.weight", np.zeros((80, 48), np.float32)),
         "unexpected tensor model.layers.2.mlp.up_proj.weight"),
        (_set("model.layers.1.mlp.up_proj.weight", np.zeros((48, 80), np.float32)),
         r"tensor model.layers.1.mlp.up_proj.weight has shape \[48, 80\].*asks for \[80, 48\]"),
        (_set("model.norm.weight", np.zeros(48, np.int8)), "model.norm.weight is stored as I8"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(llama, change, reason):
    _rewrite(llama, change)
    with pytest.raises(UserError, match=reason):
        weights.load(llama)


def test_many_wrong_tensors_are_counted(llama):
    _rewrite(llama, lambda tensors: [tensors.pop(k) for k in list(tensors) if "layers.1" in k])
    with pytest.raises(UserError, match=r"missing tensors model\.layers\.1.* and 5 more"):
        weights.load(llama)


def test_stored_rotary_frequencies_are_not_needed(llama):
    _rewrite(llama, _set("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(6, np.float32)))
    _equal(weights.load(llama)[1], weights.load(GOLDEN / "llama")[1])


def test_a_tied_head_may_be_repeated_but_not_differ(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "qwen2", tmp_path / "qwen2"))
    table = _tensors(folder)["model.embed_tokens.weight"]
    _rewrite(folder, _set("lm_head.weight", table))
    _equal(weights.load(folder)[1], weights.load(GOLDEN / "qwen2")[1])
    _rewrite(folder, _set("lm_head.weight", table + 1))
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        weights.load(folder)


def test_pickles_are_never_opened(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        weights.load(llama)
    (llama / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        weights.load(llama)


def test_broken_files(llama):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        weights.load(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        weights.load(llama)
    (llama / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: No such file"):
        weights.load(llama)


def test_broken_index(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "llama3"))
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match=r"names model-00002.*not a file beside it"):
        weights.load(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../../etc/passwd"}}))
    with pytest.raises(UserError, match="not a file beside it"):
        weights.load(folder)
    index.write_text("{}")
    with pytest.raises(UserError, match="no readable weight_map"):
        weights.load(folder)


def test_save_refuses_what_does_not_fit(tmp_path):
    config, params = _random(families.named("llama"))
    with pytest.raises(UserError, match="missing parameter final_norm/scale"):
        weights.save(tmp_path, config, {k: v for k, v in params.items() if k != "final_norm"})
    with pytest.raises(UserError, match="unexpected parameter heads/kernel"):
        weights.save(tmp_path, config, {**params, "heads": {"kernel": np.zeros(1)}})
    small = {**params, "embed": {"table": params["embed"]["table"][1:]}}
    with pytest.raises(UserError, match=r"embed/table has shape \[39, 20\].*\[40, 20\]"):
        weights.save(tmp_path, config, small)
    with pytest.raises(UserError, match="the tokenizer has 267 tokens, the model only 40"):
        weights.save(tmp_path, config, params, tokenizer=tokenizers.load_tokenizer("bytes"))
    assert not list(tmp_path.iterdir())


def test_existing_weights_are_replaced_only_on_request(tmp_path):
    config, params = _random(families.named("llama"))
    weights.save(tmp_path, config, params, shard_bytes=4000)
    with pytest.raises(UserError, match="already"):
        weights.save(tmp_path, config, params)
    zeros = jax.tree.map(np.zeros_like, params)
    weights.save(tmp_path, config, zeros, overwrite=True)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    _equal(weights.load(tmp_path)[1], zeros)


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_start_at_the_mean_and_export(tied, tmp_path):
    config, params = _random(families.named("llama"), tied)
    tokenizer = tokenizers.train_bpe(["ab"], 300, special_tokens=["<|eos|>", "<|im_end|>"])
    size = tokenizer.vocab_size
    config, params = embeddings.resize_embeddings(config, params, size)
    grown_tokenizer = tokenizer.add_tokens(["<promise>", "</promise>"])
    grown, more = embeddings.resize_embeddings(config, params, size + 2)
    assert (config.vocab_size, grown.vocab_size) == (size, size + 2)
    for name in ("embed",) if tied else ("embed", "unembed"):
        old, new = params[name]["table"], more[name]["table"]
        assert (new.shape, new.dtype) == ((size + 2, 20), np.float32)
        np.testing.assert_array_equal(new[:size], old)
        np.testing.assert_allclose(new[size:], np.stack([old.mean(0)] * 2), atol=1e-6)
    assert ("unembed" in more) != tied
    assert params["embed"]["table"].shape == (size, 20)

    # the logits of old tokens stay, those of the new ones are the average of the old
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    before = parity.model_logits(config, params, tokens)
    after = parity.model_logits(grown, more, tokens)
    np.testing.assert_allclose(after[..., :size], before, atol=1e-5)
    mean = np.repeat(before.mean(-1, keepdims=True), 2, axis=-1)
    np.testing.assert_allclose(after[..., size:], mean, atol=1e-4)

    weights.save(tmp_path, grown, more, tokenizer=grown_tokenizer)
    loaded_config, loaded = weights.load(tmp_path)
    assert loaded_config == grown
    _equal(loaded, more)
    saved = tokenizers.load_tokenizer(str(tmp_path))
    assert saved.token_id("<promise>") == size
    ids = (saved.token_id("<|eos|>"), saved.token_id("<|im_end|>"))
    assert weights.read_fields(tmp_path)["eos_token_id"] == ids[0]
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(ids)


def test_padding_rows_become_new_tokens():
    config, params = _random(families.named("gemma"), tied=True)
    params["embed"]["table"][36:] = 1e6
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    same, more = embeddings.resize_embeddings(config, params, 40, used=36)
    table = more["embed"]["table"]
    assert same == config
    assert isinstance(table, jax.Array)
    assert table.dtype == jnp.bfloat16
    mean = np.asarray(params["embed"]["table"], np.float32)[:36].mean(0)
    np.testing.assert_allclose(np.asarray(table, np.float32)[36:], [mean] * 4, rtol=1e-2)
    with pytest.raises(UserError, match="cannot shrink"):
        embeddings.resize_embeddings(config, params, 39)
    with pytest.raises(UserError, match="41 rows in use"):
        embeddings.resize_embeddings(config, params, 64, used=41)
