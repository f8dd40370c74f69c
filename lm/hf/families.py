# SPDX-License-Identifier: Apache-2.0
"""The model families of Hugging Face checkpoints: one table each, used in both directions.

A row of a table reads: name there, path here, axes there, axes here. Axes are dimension letters; a
comma separates the axes of the checkpoint's tensor, of which one may hold two of ours ("N H, D" is
a matrix of N*H rows). `{layer}` marks tensors that exist once a layer and are stacked here.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of a family's table."""

    name: str
    path: tuple[str, ...]
    theirs: tuple[str, ...]  # letters of each axis there, such as ("NH", "D")
    ours: str  # letters of the axes here, such as "DNH"

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    def their_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        sizes = _sizes(config)
        return tuple(math.prod(sizes[letter] for letter in axis) for axis in self.theirs)

    def our_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape here, without the leading axis of layers."""
        return tuple(_sizes(config)[letter] for letter in self.ours)

    def to_ours(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Reorders a checkpoint's tensor; a view where possible."""
        letters, sizes = "".join(self.theirs), _sizes(config)
        array = array.reshape([sizes[letter] for letter in letters])
        return array.transpose([letters.index(letter) for letter in self.ours])

    def to_theirs(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        """The inverse of `to_ours`, contiguous."""
        order = [self.ours.index(letter) for letter in "".join(self.theirs)]
        return np.ascontiguousarray(array.transpose(order)).reshape(self.their_shape(config))


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "F": config.mlp_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
    }


def _table(prefix: str, *rows: tuple[str, str, str, str]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(
            prefix + name,
            tuple(path.split("/")),
            tuple(axis.replace(" ", "") for axis in theirs.split(",")),
            ours.replace(" ", ""),
        )
        for name, path, theirs, ours in rows
    )


_LAYER = "model.layers.{layer}."
_UNTIED = _table("", ("lm_head.weight", "unembed/table", "V, D", "V D"))
_COMMON = _table(
    "model.",
    ("embed_tokens.weight", "embed/table", "V, D", "V D"),
    ("norm.weight", "final_norm/scale", "D", "D"),
) + _table(
    _LAYER,
    ("input_layernorm.weight", "layers/attention_norm/scale", "D", "D"),
    ("self_attn.q_proj.weight", "layers/attention/q/kernel", "N H, D", "D N H"),
    ("self_attn.k_proj.weight", "layers/attention/k/kernel", "K H, D", "D K H"),
    ("self_attn.v_proj.weight", "layers/attention/v/kernel", "K H, D", "D K H"),
    ("self_attn.o_proj.weight", "layers/attention/o/kernel", "D, N H", "N H D"),
    ("post_attention_layernorm.weight", "layers/mlp_norm/scale", "D", "D"),
    ("mlp.gate_proj.weight", "layers/mlp/gate/kernel", "F, D", "D F"),
    ("mlp.up_proj.weight", "layers/mlp/up/kernel", "F, D", "D F"),
    ("mlp.down_proj.weight", "layers/mlp/down/kernel", "D, F", "F D"),
)
_QKV_BIAS = _table(
    _LAYER,
    ("self_attn.q_proj.bias", "layers/attention/q/bias", "N H", "N H"),
    ("self_attn.k_proj.bias", "layers/attention/k/bias", "K H", "K H"),
    ("self_attn.v_proj.bias", "layers/attention/v/bias", "K H", "K H"),
)
_QK_NORM = _table(
    _LAYER,
    ("self_attn.q_norm.weight", "layers/attention/q_norm/scale", "H", "H"),
    ("self_attn.k_norm.weight", "layers/attention/k_norm/scale", "H", "H"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """What the checkpoints of one architecture share."""

    name: str
    architecture: str  # as config.json's `architectures` names it
    model_type: str
    table: tuple[Tensor, ...]
    # ModelConfig fields that the architecture implies; the others come from config.json
    implied: Mapping[str, Any]
    # what `transformers` takes for fields that config.json leaves out
    defaults: Mapping[str, Any]
    # fields that change the computation, with the only values that we compute
    refused: Mapping[str, tuple[Any, ...]]

    def tensors(self, config: ModelConfig) -> tuple[Tensor, ...]:
        """The rows that a checkpoint of this config has."""
        return self.table if config.tied_embeddings else self.table + _UNTIED


_PLAIN = {
    "qkv_bias": False,
    "qk_norm": False,
    "norm_plus_one": False,
    "scale_embeddings": False,
    "logit_softcap": None,
}
_NO = (None, False)


def _family(name, architecture, model_type, table, implied, defaults, refused) -> Family:
    return Family(
        name,
        architecture,
        model_type,
        table,
        implied=MappingProxyType(_PLAIN | implied),
        defaults=MappingProxyType({"hidden_act": "silu", "tie_word_embeddings": False} | defaults),
        refused=MappingProxyType({"partial_rotary_factor": (None, 1)} | refused),
    )


FAMILIES = (
    _family(
        *("llama", "LlamaForCausalLM", "llama"),  # Llama 2 and 3.x, Yi and Yi 1.5
        table=_COMMON,
        implied={},
        defaults={},
        refused={"attention_bias": _NO, "mlp_bias": _NO},
    ),
    _family(
        *("qwen2", "Qwen2ForCausalLM", "qwen2"),  # Qwen2 and Qwen2.5
        table=_COMMON + _QKV_BIAS,
        implied={"qkv_bias": True},
        defaults={"num_key_value_heads": 32},
        refused={},
    ),
    _family(
        *("qwen3", "Qwen3ForCausalLM", "qwen3"),
        table=_COMMON + _QK_NORM,
        implied={"qk_norm": True},
        defaults={"num_key_value_heads": 32, "head_dim": 128},
        refused={"attention_bias": _NO},
    ),
    _family(
        *("gemma", "GemmaForCausalLM", "gemma"),  # Gemma 1
        table=_COMMON,
        implied={"norm_plus_one": True, "scale_embeddings": True},
        defaults={
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "num_key_value_heads": 16,
            "head_dim": 256,
        },
        refused={"attention_bias": _NO, "use_bidirectional_attention": _NO},
    ),
)


def named(name: str) -> Family:
    """The family of this name; UserError with the valid ones."""
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise UserError(f"unknown model family {name!r}; one of {known}")


def of_fields(fields: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json; UserError naming an architecture that is not supported."""
    given = fields.get("architectures") or ()
    architecture = given[0] if given else None
    for family in FAMILIES:
        if architecture == family.architecture:
            return family
        if architecture is None and fields.get("model_type") == family.model_type:
            return family
    named_as = architecture or f"model_type {fields.get('model_type')!r}"
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(f"{where}: architecture {named_as} is not supported; supported are {known}")


def of_model(config: ModelConfig) -> Family:
    """A family whose checkpoints can hold this model; UserError when none can."""
    reasons = []
    for family in FAMILIES:
        reason = cannot_express(family, config)
        if reason is None:
            return family
        reasons.append(f"{family.name}: {reason}")
    raise UserError(f"no Hugging Face architecture holds this model ({'; '.join(reasons)})")


def cannot_express(family: Family, config: ModelConfig) -> str | None:
    """Why a model does not fit a family, or None when it does."""
    if config.lora.rank:
        return "its adapters are not merged"
    differing = [
        f"{field}={getattr(config, field)!r}"
        for field, value in family.implied.items()
        if getattr(config, field) != value
    ]
    return ", ".join(differing) or None


@functools.lru_cache(maxsize=64)
def expected(family: Family, config: ModelConfig) -> Mapping[str, tuple[Tensor, int | None]]:
    """Every tensor name of a checkpoint -> (row of the table, layer or None), layer by layer."""
    rows = family.tensors(config)
    names = {row.name: (row, None) for row in rows if not row.per_layer}
    for layer in range(config.num_layers):
        names |= {row.name.format(layer=layer): (row, layer) for row in rows if row.per_layer}
    return MappingProxyType(names)
