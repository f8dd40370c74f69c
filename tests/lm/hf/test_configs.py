# SPDX-License-Identifier: Apache-2.0
"""config.json in both directions and both spellings; what is refused, by name."""

import dataclasses
import json
from pathlib import Path

import pytest

from lm.config import LoraConfig, ModelConfig, RopeScaling
from lm.errors import UserError
from lm.hf import configs, families

GOLDEN = Path(__file__).parents[2] / "golden" / "hf"
NAMES = ("gemma", "llama", "llama3", "qwen2", "qwen2_yarn", "qwen3")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN_SCALING = {"factor": 4.0, "original_max_position_embeddings": 1024}


def _of(architecture, **changes):
    model_type = architecture.removesuffix("ForCausalLM").lower()
    return {**LLAMA, "architectures": [architecture], "model_type": model_type, **changes}


def test_llama_by_hand():
    assert configs.config_from_hf(LLAMA) == ModelConfig(
        vocab_size=128,
        num_layers=2,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=96,
        rope_theta=10000.0,
        norm_eps=1e-5,
    )


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("LlamaForCausalLM", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ("LlamaForCausalLM", {"head_dim": 32, "tie_word_embeddings": True},
         {"head_dim": 32, "tied_embeddings": True}),
        ("LlamaForCausalLM", {"rope_theta": 5000000, "pretraining_tp": 1}, {"rope_theta": 5e6}),
        ("Qwen2ForCausalLM", {}, {"qkv_bias": True, "qk_norm": False, "head_dim": 16}),
        ("Qwen2ForCausalLM", {"sliding_window": 32, "use_sliding_window": False}, {}),
        ("Qwen2ForCausalLM",
         {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, {}),
        ("Qwen3ForCausalLM", {}, {"qk_norm": True, "qkv_bias": False, "head_dim": 128}),
        ("GemmaForCausalLM", {"hidden_act": "gelu", "hidden_activation": None},
         {"activation": "gelu_tanh", "head_dim": 256, "tied_embeddings": True,
          "norm_plus_one": True, "scale_embeddings": True}),
        ("GemmaForCausalLM", {"hidden_act": "gelu", "hidden_activation": "silu"},
         {"activation": "silu"}),
        ("GemmaForCausalLM", {"hidden_act": None}, {"activation": "gelu_tanh"}),
    ],
)  # fmt: skip
def test_what_families_imply_and_default(architecture, changes, expected):
    config = configs.config_from_hf(_of(architecture, **changes))
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_family_is_found_by_model_type_when_architectures_is_absent():
    fields = _of("Qwen3ForCausalLM")
    del fields["architectures"]
    assert configs.config_from_hf(fields).qk_norm


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}},
         RopeScaling("llama3", 8.0, 1.0, 4.0, 1024)),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3_SCALING}},
         RopeScaling("llama3", 8.0, 1.0, 4.0, 1024)),
        ({"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 2}},
         RopeScaling("linear", 2.0)),
        ({"rope_theta": 500.0, "rope_scaling": {"type": "yarn", "finetuned": True, **YARN_SCALING}},
         RopeScaling("yarn", 4.0, original_max_positions=1024)),
        ({"rope_theta": 500.0, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_fast": 16,
            "beta_slow": None, "truncate": False}},
         RopeScaling("yarn", 4.0, original_max_positions=4096, attention_factor=1.5,
                     beta_fast=16.0, truncate=False)),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": None,
                              "original_max_position_embeddings": 1024}},
         RopeScaling("yarn", 4.0, original_max_positions=1024)),
        ({"rope_theta": 500.0, "original_max_position_embeddings": 512,
          "rope_scaling": {"rope_type": "yarn", **YARN_SCALING}},
         RopeScaling("yarn", 4.0, original_max_positions=512)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, None),
        ({"rope_theta": 500.0, "rope_scaling": None}, None),
        ({"rope_theta": 500.0, "rope_scaling": {"type": "yarn", **YARN_SCALING},
          "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **YARN_SCALING}},
         RopeScaling("yarn", 4.0, original_max_positions=1024)),
    ],
)  # fmt: skip
def test_rotary_parameters_in_both_spellings(spelling, expected):
    config = configs.config_from_hf({**LLAMA, **spelling})
    assert config.rope_theta == 500.0
    assert config.rope_scaling == expected


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (_of("MistralForCausalLM"), "architecture MistralForCausalLM is not supported"),
        (_of("Qwen3MoeForCausalLM"), "architecture Qwen3MoeForCausalLM is not supported"),
        (_of("Gemma2ForCausalLM"), "architecture Gemma2ForCausalLM is not supported"),
        (_of("LlamaForSequenceClassification"), "LlamaForSequenceClassification is not supported"),
        ({**LLAMA, "architectures": None, "model_type": "phi3"}, "model_type 'phi3'"),
        ({}, "model_type None"),
        ({**LLAMA, "attention_bias": True}, "attention_bias=True is not supported"),
        ({**LLAMA, "mlp_bias": True}, "mlp_bias=True is not supported"),
        (_of("Qwen3ForCausalLM", attention_bias=True), "attention_bias=True"),
        (_of("GemmaForCausalLM", use_bidirectional_attention=True), "use_bidirectional_attention"),
        ({**LLAMA, "hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({**LLAMA, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
         "partial_rotary_factor is not supported"),
        ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({**LLAMA, "rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "linear rotary scaling lacks factor"),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
         "lacks high_freq_factor, low_freq_factor"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "mscale": 0.7, **YARN_SCALING}}, "with mscale"),
        ({**LLAMA, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
         "rope_theta is both 10000.0 and 1000000.0"),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
         "differ by layer"),
        (_of("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=32, max_window_layers=1),
         "max_window_layers=1 of 2 layers"),
        (_of("Qwen3ForCausalLM", layer_types=["full_attention", "sliding_attention"]),
         "layer_types sliding_attention"),
        ({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\)"),
        ({**LLAMA, "hidden_size": None}, "hidden_size is missing"),
        ({**LLAMA, "vocab_size": "128"}, "vocab_size='128' is not a positive integer"),
        ({**LLAMA, "num_key_value_heads": 3}, "not a multiple"),
    ],
)  # fmt: skip
def test_refused_by_name(fields, reason):
    with pytest.raises(UserError, match=f"some/config.json.*{reason}"):
        configs.config_from_hf(fields, "some/config.json")


@pytest.mark.parametrize("name", NAMES)
def test_config_round_trip_of_golden_files(name):
    fields = json.loads((GOLDEN / name / "config.json").read_text())
    config = configs.config_from_hf(fields)
    family = families.of_fields(fields, name)
    back = configs.config_to_hf(config, family, max_positions=fields["max_position_embeddings"])
    assert configs.config_from_hf(back) == config
    # what we write and the original has says the same; null is transformers' other word for false
    rope = fields.pop("rope_parameters")
    assert {name: back["rope_parameters"].get(name) for name in rope} == rope
    common = back.keys() & fields.keys()
    assert len(common) > 10
    assert {name: back[name] or None for name in common} == {
        name: fields[name] or None for name in common
    }


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling("linear", 2.0),
        RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
        RopeScaling("yarn", 4.0, original_max_positions=32, attention_factor=1.2, truncate=False),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda f: f.name)
def test_config_round_trip(family, tied, scaling):
    config = ModelConfig(
        vocab_size=10, rope_scaling=scaling, tied_embeddings=tied, activation="gelu_tanh",
        rope_theta=123.0, norm_eps=1e-4, **family.implied,
    )  # fmt: skip
    fields = json.loads(json.dumps(configs.config_to_hf(config, family.name)))
    assert configs.config_from_hf(fields) == config
    for spelling in (("rope_theta", "rope_scaling"), ("rope_parameters",)):
        assert configs.config_from_hf(_without(fields, spelling)) == config
    if scaling and scaling.kind != "linear":
        reach = scaling.factor * scaling.original_max_positions
        assert fields["max_position_embeddings"] == reach


def _without(fields, names):
    return {key: value for key, value in fields.items() if key not in names}


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"qkv_bias": True}, "LlamaForCausalLM cannot hold this model: qkv_bias=True"),
        ("qwen3", {"qk_norm": False}, "qk_norm=False"),
        ("gemma", {"scale_embeddings": False}, "scale_embeddings=False"),
        ("qwen2", {"logit_softcap": 30.0}, "logit_softcap=30.0"),
        ("llama", {"lora": LoraConfig(rank=4)}, "adapters are not merged"),
    ],
)
def test_families_refuse_models_that_they_cannot_hold(family, changes, reason):
    fitting = ModelConfig(vocab_size=10, **families.named(family).implied)
    assert families.of_model(fitting).name == family
    with pytest.raises(UserError, match=reason):
        configs.config_to_hf(dataclasses.replace(fitting, **changes), family)


def test_no_family_holds_everything():
    with pytest.raises(UserError, match=r"no Hugging Face architecture.*llama: logit_softcap=5\.0"):
        families.of_model(ModelConfig(logit_softcap=5.0))
    with pytest.raises(UserError, match="unknown model family 'gpt'; one of llama, qwen2"):
        families.named("gpt")
