# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs of a training step, from counts alone; a multiply-add counts two.

Forward and backward: 6 per matrix parameter of the layers and token, 6 D V per trained edge (rows
that train nothing never meet the unembedding), 12 N H L per visible (row, key) pair (scores and
values, forward and twice back). With LoRA the base weights get no gradient of their own: 4 instead
of 6, and 6 for the adapters.
"""

from lm.config import ModelConfig


def _matrices(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear maps of one layer."""
    D, F = model.embed_dim, model.mlp_dim
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "q": (D, heads),
        "k": (D, kv_heads),
        "v": (D, kv_heads),
        "o": (heads, D),
        "gate": (D, F),
        "up": (D, F),
        "down": (F, D),
    }


def trunk_parameters(model: ModelConfig) -> int:
    """Matrix parameters of all layers, without embeddings, norms, biases and adapters."""
    return model.num_layers * sum(i * o for i, o in _matrices(model).values())


def adapter_parameters(model: ModelConfig) -> int:
    """Parameters of the LoRA adapters; 0 without them."""
    shapes = _matrices(model)
    sizes = sum(sum(shapes[name]) for name in model.lora.targets)
    return model.num_layers * model.lora.rank * sizes


def training_flops(model: ModelConfig, tokens: float, edges: float, pairs: float) -> float:
    """Model FLOPs of forward and backward over so many tokens, trained edges and visible pairs."""
    base = 4 if model.lora.rank else 6
    per_token = base * trunk_parameters(model) + 6 * adapter_parameters(model)
    per_edge = base * model.embed_dim * model.vocab_size
    per_pair = 12 * model.num_heads * model.head_dim * model.num_layers
    return float(tokens * per_token + edges * per_edge + pairs * per_pair)
