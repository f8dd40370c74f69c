# SPDX-License-Identifier: Apache-2.0
"""config.json to `ModelConfig` and back: what is not computed here is refused, never ignored."""

from collections.abc import Mapping
from typing import Any

from lm.config import ModelConfig, RopeScaling
from lm.errors import UserError
from lm.hf import families
from lm.hf.families import Family

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_ACTIVATION_NAMES = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
_ROPE_KEYS = {
    "linear": {"factor"},
    "llama3": {
        *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    },
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "truncate"),
    },
}
_DEFAULT_MAX_POSITIONS = 32768  # a limit that servers read; nothing here depends on it


def config_from_hf(fields: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of a parsed config.json, in either spelling of the rotary parameters.

    Args:
      fields: the parsed file.
      where: its name, for messages.

    Raises:
      UserError: an architecture or a setting that is not supported, by name; a missing or odd size.
    """
    family = families.of_fields(fields, where)
    fields = {**family.defaults, **{k: v for k, v in fields.items() if v is not None}}
    _refuse(fields, family, where)
    heads, width = _size(fields, "num_attention_heads", where), _size(fields, "hidden_size", where)
    theta, scaling = _rope(fields, where)
    try:
        return ModelConfig(
            vocab_size=_size(fields, "vocab_size", where),
            num_layers=_size(fields, "num_hidden_layers", where),
            embed_dim=width,
            num_heads=heads,
            num_kv_heads=_size(fields, "num_key_value_heads", where, heads),
            head_dim=_size(fields, "head_dim", where, width // heads),
            mlp_dim=_size(fields, "intermediate_size", where),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
            activation=_activation(fields, family, where),
            tied_embeddings=bool(fields["tie_word_embeddings"]),
            **family.implied,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def config_to_hf(
    config: ModelConfig, family: str | Family, *, max_positions: int | None = None
) -> dict[str, Any]:
    """A config.json that `transformers` 4 and 5 both read.

    Args:
      config: the model, adapters merged.
      family: the architecture to export as.
      max_positions: the longest sequence to declare; None takes what the rotary scaling reaches.

    Raises:
      UserError: the family cannot express this model.
    """
    family = families.named(family) if isinstance(family, str) else family
    reason = families.cannot_express(family, config)
    if reason:
        raise UserError(f"{family.architecture} cannot hold this model: {reason}")
    rope = _rope_fields(config)
    if max_positions is None:
        max_positions = _DEFAULT_MAX_POSITIONS
        if config.rope_scaling is not None and config.rope_scaling.kind != "linear":
            reach = config.rope_scaling.factor * config.rope_scaling.original_max_positions
            max_positions = int(reach)
    fields = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": _ACTIVATION_NAMES[config.activation],
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling is not None else None,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        **{name: False for name, allowed in family.refused.items() if False in allowed},
    }
    if family.name == "gemma":
        fields["hidden_activation"] = fields["hidden_act"]  # the name before transformers 5
    return fields


def _size(fields: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = fields.get(name, default)
    if value is None:
        raise UserError(f"{where}: {name} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {name}={value!r} is not a positive integer")
    return value


def _refuse(fields: Mapping[str, Any], family: Family, where: str) -> None:
    """Settings that change the computation in ways that do not exist here."""
    for name, allowed in family.refused.items():
        if fields.get(name) not in allowed:
            raise UserError(f"{where}: {name}={fields[name]!r} is not supported")
    if "quantization_config" in fields:
        method = fields["quantization_config"].get("quant_method", "unknown")
        raise UserError(f"{where}: quantization_config ({method}) is not supported")
    layers = range(_size(fields, "num_hidden_layers", where))
    first = fields.get("max_window_layers", 28)
    if fields.get("use_sliding_window") and fields.get("sliding_window") and first < len(layers):
        raise UserError(
            f"{where}: use_sliding_window with max_window_layers={first} of {len(layers)} layers "
            "is not supported"
        )
    odd = set(fields.get("layer_types", ())) - {"full_attention"}
    if odd:
        raise UserError(f"{where}: layer_types {', '.join(sorted(odd))} are not supported")


def _activation(fields: Mapping[str, Any], family: Family, where: str) -> str:
    name = fields["hidden_act"]
    if family.name == "gemma":
        # Released files say "gelu" and mean its tanh form; `hidden_activation` came to fix that.
        name = fields.get("hidden_activation", "gelu_pytorch_tanh" if name == "gelu" else name)
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"{where}: hidden_act={name!r} is not supported; supported are {known}")
    return _ACTIVATIONS[name]


def _rope(fields: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_theta` + `rope_scaling`, or from `rope_parameters`."""
    old, new = dict(fields.get("rope_scaling", {})), dict(fields.get("rope_parameters", {}))
    for parameters in (old, new):
        if any(isinstance(value, Mapping) for value in parameters.values()):
            raise UserError(f"{where}: rotary parameters that differ by layer are not supported")
        if "type" in parameters:  # the spelling before rope_type
            parameters.setdefault("rope_type", parameters["type"])
            del parameters["type"]
    if "rope_theta" in fields:
        old["rope_theta"] = fields["rope_theta"]
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            raise UserError(f"{where}: {name} is both {old[name]!r} and {new[name]!r}")
    parameters = {k: v for k, v in (old | new).items() if v is not None}
    theta = float(parameters.pop("rope_theta", 10000.0))
    kind = parameters.pop("rope_type", "default")
    if parameters.pop("partial_rotary_factor", 1) != 1:
        raise UserError(f"{where}: partial_rotary_factor is not supported")
    parameters.pop("finetuned", None)  # says how a checkpoint was made
    if kind == "default":
        parameters.clear()  # nothing reads them
        return theta, None
    if kind not in _ROPE_KEYS:
        known = ", ".join(("default", *_ROPE_KEYS))
        raise UserError(f"{where}: rope_type={kind!r} is not supported; supported are {known}")
    return theta, _scaling(kind, parameters, fields, where)


def _scaling(
    kind: str, parameters: dict[str, Any], fields: Mapping[str, Any], where: str
) -> RopeScaling:
    original = "original_max_position_embeddings"
    if original in _ROPE_KEYS[kind]:
        # transformers lets the outer field win, and falls back on the declared length
        fallback = fields.get("max_position_embeddings")
        parameters[original] = fields.get(original, parameters.get(original, fallback))
        if parameters[original] is None:
            raise UserError(f"{where}: {kind} rotary scaling lacks {original}")
    if kind == "yarn" and "factor" not in parameters and "max_position_embeddings" in fields:
        parameters["factor"] = fields["max_position_embeddings"] / parameters[original]
    unknown = parameters.keys() - _ROPE_KEYS[kind]
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UserError(f"{where}: {kind} rotary scaling with {names} is not supported")
    required = {"llama3": _ROPE_KEYS["llama3"]}.get(kind, {"factor"})
    missing = required - parameters.keys()
    if missing:
        raise UserError(f"{where}: {kind} rotary scaling lacks {', '.join(sorted(missing))}")
    if original in parameters:
        parameters["original_max_positions"] = int(parameters.pop(original))
    for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
        if name in parameters:
            parameters[name] = float(parameters[name])
    return RopeScaling(kind=kind, **parameters)


def _rope_fields(config: ModelConfig) -> dict[str, Any]:
    """The rotary scaling as config.json writes it."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    values = {
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "attention_factor": scaling.attention_factor,
        "truncate": scaling.truncate,
    }
    keys = _ROPE_KEYS[scaling.kind]
    chosen = {k: v for k, v in values.items() if k in keys and v is not None}
    return {"rope_type": scaling.kind, **chosen}
