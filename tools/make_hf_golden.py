# SPDX-License-Identifier: Apache-2.0
"""Writes tests/golden/hf: tiny random checkpoints of each family and the logits of transformers.

Needs torch and transformers, which the tests do not: `python tools/make_hf_golden.py`. Each
directory holds config.json, safetensors, tokens.npy [B, T] int32 and logits.npy [B, T, V] float32.
"""

import math
import pathlib
import shutil

import numpy as np
import torch
import transformers

ROOT = pathlib.Path(__file__).parents[1] / "tests" / "golden" / "hf"
BATCH, LENGTH = 2, 48
SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
# directory: (model class, its config class, changed settings, largest shard)
VARIANTS = {
    "llama": (
        *(transformers.LlamaForCausalLM, transformers.LlamaConfig),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "rms_norm_eps": 1e-5},
        "1GB",
    ),
    "llama3": (
        *(transformers.LlamaForCausalLM, transformers.LlamaConfig),
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
        "50KB",
    ),
    "qwen2": (
        *(transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
        "1GB",
    ),
    "qwen2_yarn": (
        *(transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
        {"rope_parameters": YARN, "num_attention_heads": 2, "max_position_embeddings": 96},
        "1GB",
    ),
    "qwen3": (
        *(transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
        {"head_dim": 20, "tie_word_embeddings": False},
        "1GB",
    ),
    "gemma": (
        *(transformers.GemmaForCausalLM, transformers.GemmaConfig),
        {"head_dim": 16, "num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"},
        "1GB",
    ),
}


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights large enough that every part moves the logits; no scale or bias at its default."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            parameter.data = 1.5 * noise / math.sqrt(parameter.shape[1])
        else:
            parameter.data = parameter.data + 0.3 * noise


def main() -> None:
    """Rebuilds every directory."""
    for seed, (name, (model_class, config_class, changes, shard)) in enumerate(VARIANTS.items()):
        folder = ROOT / name
        shutil.rmtree(folder, ignore_errors=True)
        config = config_class(**{**SIZES, **changes}, attn_implementation="eager")
        model = model_class(config).eval()
        randomise(model, torch.Generator().manual_seed(seed))
        shape = (BATCH, LENGTH)
        tokens = np.random.default_rng(seed).integers(0, config.vocab_size, shape, np.int32)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens).long()).logits.float().numpy()
        model.save_pretrained(folder, max_shard_size=shard)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.save(folder / "tokens.npy", tokens)
        np.save(folder / "logits.npy", logits)
        print(f"{name}: logits within {np.abs(logits).max():.1f}")


if __name__ == "__main__":
    main()
