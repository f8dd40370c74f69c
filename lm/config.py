# SPDX-License-Identifier: Apache-2.0
"""Frozen configuration dataclasses, and the one place where an `ml_collections` config becomes
them."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from lm.errors import UserError

T = TypeVar("T")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name}={value!r} is not one of {', '.join(choices)}")


def require_positive(name: str, value: int) -> None:
    """Raises UserError unless `value` is at least 1."""
    if value < 1:
        raise UserError(f"{name}={value} must be at least 1")


def require_at_least_zero(name: str, value: float) -> None:
    """Raises UserError for a negative number, and for one that is none or has no end."""
    if not 0 <= value < math.inf:
        raise UserError(f"{name}={value} must {'not be negative' if value < 0 else 'be finite'}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-training length."""

    kind: str  # "llama3", "yarn" or "linear"
    factor: float
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_positions: int = 8192  # llama3, yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1
    truncate: bool = True  # yarn: round the correction range to whole dimensions

    def __post_init__(self):
        require_choice("rope_scaling.kind", self.kind, ("llama3", "yarn", "linear"))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): y = x W + (alpha / rank) x A B, with W frozen."""

    rank: int = 0  # 0 trains the full model
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    def __post_init__(self):
        require_at_least_zero("model.lora.rank", self.rank)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. `vocab_size` 0 takes the tokenizer's, padded to a multiple of
    128."""

    vocab_size: int = 0
    num_layers: int = 2
    embed_dim: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    mlp_dim: int = 128
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    activation: str = "silu"  # gate of the MLP: "silu" (SwiGLU) or "gelu_tanh" (GeGLU)
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    logit_softcap: float | None = None
    norm_plus_one: bool = False  # RMSNorm multiplies by (1 + scale), as Gemma does
    scale_embeddings: bool = False  # multiply embeddings by sqrt(embed_dim), as Gemma does
    dtype: str = "float32"  # compute dtype; parameters keep their own
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        require_at_least_zero("model.vocab_size", self.vocab_size)
        for name in (
            "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
        ):  # fmt: skip
            require_positive(f"model.{name}", getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} must be even: RoPE rotates pairs")
        require_choice("model.activation", self.activation, ("silu", "gelu_tanh"))
        require_choice("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        unknown = set(self.lora.targets) - {"q", "k", "v", "o", "gate", "up", "down"}
        if unknown:
            raise UserError(f"model.lora.targets: unknown {', '.join(sorted(unknown))}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where conversations or documents come from and how they become rows."""

    # "arithmetic", "gsm8k:FILE" or a JSON/JSONL file of conversations; for plain text also
    # "python" (the standard library), "python+site" (and installed packages) or "python:DIR"
    source: str = "arithmetic"
    tokenizer: str = "auto"  # "auto" (the checkpoint's, else bytes), "bytes", "bpe:SIZE" or a path
    template: str = ""  # "" takes the tokenizer's own; else a built-in name or a .jinja file
    policy: str = "interleaved"  # which thoughts stay: interleaved, preserved or per_message
    think_open: str = "<think>"
    think_close: str = "</think>"
    on_error: str = "stop"  # malformed records: "stop" or "skip" (and count)
    mode: str = "tree"  # tree, paper, n_pass, n_pass_merged or k_pass:K
    seq_len: int = 512
    window: int = 256  # layouts that packing looks at together
    overlong: str = "drop"  # a sample longer than seq_len: "drop" (and count) or "truncate" (left)
    limit: int = 0  # conversations or files to train on; 0: all of them, 2,000 of arithmetic
    seed: int = 0
    min_turns: int = 2  # arithmetic only
    max_turns: int = 4  # arithmetic; problems per conversation of GSM8K
    max_number: int = 20  # arithmetic only: every number lies in 0..max_number
    max_operand: int = 9  # arithmetic only: the largest number added or subtracted
    tools: bool = False  # arithmetic only: some turns call a calculator
    validation_fraction: float = 0.1  # of a source, held out from training for `evaluate`
    eval_conversations: int = 64  # at most so many are evaluated, or so many files

    def __post_init__(self):
        require_choice("data.policy", self.policy, ("interleaved", "preserved", "per_message"))
        require_choice("data.on_error", self.on_error, ("stop", "skip"))
        require_choice("data.overlong", self.overlong, ("drop", "truncate"))
        require_positive("data.seq_len", self.seq_len)
        require_positive("data.window", self.window)
        require_positive("data.eval_conversations", self.eval_conversations)
        require_at_least_zero("data.limit", self.limit)
        require_at_least_zero("data.seed", self.seed)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a warm-up and a decay."""

    learning_rate: float = 1e-3
    schedule: str = "cosine"  # after the warm-up: "cosine", "linear" or "constant"
    warmup_steps: int = 20
    final_fraction: float = 0.1  # of learning_rate, at the last step
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # matrices only
    clip_norm: float = 1.0  # 0: none

    def __post_init__(self):
        require_choice("optimizer.schedule", self.schedule, ("cosine", "linear", "constant"))
        for name in (
            "learning_rate",
            "warmup_steps",
            "final_fraction",
            "weight_decay",
            "clip_norm",
        ):
            require_at_least_zero(f"optimizer.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    batch_size: int = 8  # rows of seq_len per optimiser step, over all devices
    accumulate: int = 1  # microbatches that an optimiser step is split into
    steps: int = 100  # 0: run `epochs` of the data instead
    epochs: int = 1  # used when steps is 0, and by `compare`
    weighting: str = "per_token"  # "per_token", or "per_turn": each turn counts the same
    remat: str = "none"  # "full"; "dots": keep products and attention, recompute the rest
    implementation: str = ""  # of the ops: "" picks the first that serves
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    log_every: int = 10
    verify_every: int = 0  # check a sampled row against its own N-pass; 0: never
    seed: int = 0

    def __post_init__(self):
        require_choice("train.remat", self.remat, ("none", "full", "dots"))
        require_choice("train.weighting", self.weighting, ("per_token", "per_turn"))
        require_positive("train.batch_size", self.batch_size)
        require_positive("train.accumulate", self.accumulate)
        require_positive("train.log_every", self.log_every)
        require_positive("train.checkpoint_every", self.checkpoint_every)
        require_positive("train.keep_checkpoints", self.keep_checkpoints)
        require_at_least_zero("train.steps", self.steps)
        require_at_least_zero("train.verify_every", self.verify_every)
        require_at_least_zero("train.seed", self.seed)
        if not self.steps:
            require_positive("train.epochs", self.epochs)
        if self.batch_size % self.accumulate:
            raise UserError(
                f"train.batch_size={self.batch_size} is not a multiple of "
                f"train.accumulate={self.accumulate}"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; `fsdp` -1 takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    max_new_tokens: int = 64

    def __post_init__(self):
        require_at_least_zero("sampling.temperature", self.temperature)
        require_at_least_zero("sampling.top_k", self.top_k)
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p={self.top_p} must be in (0, 1]")
        require_positive("sampling.max_new_tokens", self.max_new_tokens)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run of one experiment needs."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    sampling: SamplingConfig = SamplingConfig()
    init_from: str = ""  # a Hugging Face directory or a workdir to start from


def freeze(config: Mapping[str, Any], cls: type[T] = Config, prefix: str = "") -> T:
    """Turns a (nested) mapping into the dataclass `cls`; unknown keys and wrong types raise
    UserError."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key in config:
        name = f"{prefix}{key}"
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise UserError(f"unknown config key {name}{hint}")
        values[key] = _coerce(name, config[key], hints[key])
    return cls(**values)


def _coerce(name: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"config key {name} is a section, not {value!r}")
        return freeze(value, hint, prefix=f"{name}.")
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise UserError(f"config key {name}={value!r} must be a sequence")
        of, *more = typing.get_args(hint)
        if more == [...]:
            return tuple(_coerce(f"{name}[{i}]", one, of) for i, one in enumerate(value))
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"config key {name}={value!r} must be of type {hint.__name__}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain dict of a config dataclass, JSON-serialisable."""
    return dataclasses.asdict(config)
