# SPDX-License-Identifier: Apache-2.0
"""Does a Hugging Face checkpoint compute the same here as in `transformers`?

Both sides run in float32. The other side is either `transformers` itself, which is optional and
only imported here, or logits that were stored beside the checkpoint.
"""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import contexts, transformer
from lm.config import ModelConfig
from lm.errors import UserError
from lm.hf import families, weights
from lm.text.tokenizers import load_tokenizer
from ops.visibility import Visibility

MAX_ABS = 1e-3  # float32 logits of a large model differ by the order of summation alone
MAX_KL = 1e-6
_LENGTH = 64  # random tokens, when there is no prompt


def parity(
    hf_dir: str | Path,
    *,
    prompt: str | None = None,
    tokens: Sequence[Sequence[int]] | np.ndarray | None = None,
    golden: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares the logits of a checkpoint here and there.

    Args:
      hf_dir: directory with config.json and safetensors.
      prompt: text to run, through the checkpoint's own tokenizer.
      tokens: ids [B, T] to run instead. Without either: one row of random ids drawn with `seed`.
      golden: compare with logits.npy [B, T, V] on tokens.npy [B, T] of `hf_dir` and not with
        `transformers`.
      seed: of the random ids.

    Returns:
      family; max_abs, the largest difference of two logits; kl, the mean over positions of
      KL(theirs || ours) in nats; positions, how many were compared; against, the other side.

    Raises:
      UserError: the other side is not there, or two sources of tokens were given.
    """
    hf_dir = Path(hf_dir)
    given = [name for name, x in (("prompt", prompt), ("tokens", tokens)) if x is not None]
    if len(given) + golden > 1:
        raise UserError(f"choose one of {', '.join([*given, 'golden'][: len(given) + golden])}")
    family = families.of_fields(weights.read_fields(hf_dir), str(hf_dir))
    config = weights.read_config(hf_dir)
    if golden:
        tokens, theirs = _stored(hf_dir)
    else:
        tokens = _tokens(hf_dir, config, prompt, tokens, seed)
        _check_tokens(tokens, config)
        theirs = _transformers_logits(hf_dir, tokens)
    _check_tokens(tokens, config)
    ours = our_logits(hf_dir, tokens)
    if ours.shape != theirs.shape:
        raise UserError(f"{hf_dir}: logits {list(theirs.shape)} there, {list(ours.shape)} here")
    return {
        "family": family.name,
        "max_abs": float(np.abs(ours - theirs).max()),
        "kl": _mean_kl(theirs, ours),
        "positions": int(tokens.size),
        "against": "logits.npy" if golden else "transformers",
    }


def our_logits(hf_dir: str | Path, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [B, T, V] of a checkpoint for ids [B, T] int32, from position 0 on."""
    config, params = weights.load(hf_dir, dtype="float32", place=lambda _, x: jnp.asarray(x))
    return model_logits(config, params, tokens)


def model_logits(config: ModelConfig, params: transformer.Params, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [B, T, V] under causal attention, with full-precision products."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(_forward(config, params, jnp.asarray(tokens, jnp.int32)))


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: ModelConfig, params: transformer.Params, tokens: jax.Array) -> jax.Array:
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.broadcast_to(positions[None], tokens.shape)
    context = contexts.Training(Visibility.causal(*tokens.shape))
    hidden, _ = transformer.hidden(config, params, tokens, positions, context)
    return transformer.logits(config, params, hidden)


def _tokens(
    hf_dir: Path,
    config: ModelConfig,
    prompt: str | None,
    tokens: Sequence[Sequence[int]] | np.ndarray | None,
    seed: int,
) -> np.ndarray:
    """Ids [B, T] int32."""
    if prompt is not None:
        return load_tokenizer(str(hf_dir)).encode(prompt)[None]
    if tokens is None:
        generator = np.random.default_rng(seed)
        tokens = generator.integers(0, config.vocab_size, (1, _LENGTH))
    return np.asarray(tokens, np.int32)


def _check_tokens(tokens: np.ndarray, config: ModelConfig) -> None:
    if tokens.ndim != 2 or not tokens.size:
        raise UserError(f"tokens of shape {list(tokens.shape)}; [batch, length] is needed")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise UserError(
            f"token ids {tokens.min()}..{tokens.max()} are not all below the vocabulary of "
            f"{config.vocab_size}"
        )


def _stored(hf_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The ids and logits that lie beside a checkpoint."""
    found = []
    for name in ("tokens.npy", "logits.npy"):
        try:
            found.append(np.load(hf_dir / name, allow_pickle=False))
        except OSError as error:
            raise UserError(f"{hf_dir / name}: {error.strerror or error}") from None
        except ValueError as error:
            raise UserError(f"{hf_dir / name}: {error}") from None
    return found[0], found[1]


def _transformers_logits(hf_dir: Path, tokens: np.ndarray) -> np.ndarray:
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{package} is not installed: `pip install torch transformers`, or compare with "
                "the tokens.npy and logits.npy of the directory (--golden)"
            )
    import torch
    import transformers

    # local_files_only: a wrong path must not become a download
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(hf_dir), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def _mean_kl(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Mean over positions of KL(theirs || ours), in float64 for the small differences."""
    p, q = (_log_softmax(x.astype(np.float64)) for x in (theirs, ours))
    return float(max((np.exp(p) * (p - q)).sum(-1).mean(), 0.0))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
