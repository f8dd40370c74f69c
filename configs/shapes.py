# SPDX-License-Identifier: Apache-2.0
"""Published model shapes, as the `model` section of a config. vocab_size 0 follows the
tokenizer."""

from ml_collections import ConfigDict


def model(**overrides) -> ConfigDict:
    """A tiny decoder; every other shape overrides it."""
    config = ConfigDict()
    config.vocab_size = 0
    config.num_layers = 4
    config.embed_dim = 128
    config.num_heads = 4
    config.num_kv_heads = 2
    config.head_dim = 32
    config.mlp_dim = 384
    config.rope_theta = 10000.0
    config.norm_eps = 1e-6
    config.activation = "silu"
    config.qkv_bias = False
    config.qk_norm = False
    config.tied_embeddings = True
    config.norm_plus_one = False
    config.scale_embeddings = False
    config.dtype = "float32"
    config.lora = ConfigDict({"rank": 0, "alpha": 16.0})
    config.update(overrides)
    return config


def llama_3_2_1b() -> ConfigDict:
    """Llama-3.2-1B (1.24 B parameters)."""
    return model(
        vocab_size=128256,
        num_layers=16,
        embed_dim=2048,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        mlp_dim=8192,
        rope_theta=500000.0,
        rope_scaling=_llama3_scaling(32.0),
        norm_eps=1e-5,
        dtype="bfloat16",
    )


def llama_3_1_8b() -> ConfigDict:
    """Llama-3.1-8B (8.03 B parameters)."""
    return model(
        vocab_size=128256,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=14336,
        rope_theta=500000.0,
        rope_scaling=_llama3_scaling(8.0),
        norm_eps=1e-5,
        tied_embeddings=False,
        dtype="bfloat16",
    )


def _llama3_scaling(factor: float) -> ConfigDict:
    return ConfigDict(
        {
            "kind": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_positions": 8192,
        }
    )


def qwen3_0_6b() -> ConfigDict:
    """Qwen3-0.6B (0.60 B parameters)."""
    return model(
        vocab_size=151936,
        num_layers=28,
        embed_dim=1024,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=3072,
        rope_theta=1000000.0,
        qk_norm=True,
        dtype="bfloat16",
    )
