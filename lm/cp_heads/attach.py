# SPDX-License-Identifier: Apache-2.0
"""CP heads beside a Hugging Face checkpoint, whose own files are never written.

A head is two files, next to the weights or in a directory of their own: cp_head.safetensors with
the parameters, cp_head.json with the `HeadConfig`, the shape of the model and a digest of its
weights, so that a head is not loaded onto a model that it was not made for.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lm import transformer, tuned
from lm.config import ModelConfig, freeze, to_dict
from lm.cp_heads import head
from lm.cp_heads.head import HeadConfig, HeadParams
from lm.errors import RunError, UserError

WEIGHTS, FIELDS = "cp_head.safetensors", "cp_head.json"


@dataclasses.dataclass(frozen=True)
class Attached:
    """A head as it was saved."""

    config: HeadConfig
    head: HeadParams
    base: pathlib.Path  # the Hugging Face directory that it belongs to
    digest: str  # of that model's weights
    vocab_size: int


def save(
    directory: pathlib.Path,
    base: pathlib.Path,
    config: HeadConfig,
    params: HeadParams,
    model: ModelConfig,
    base_digest: str,
) -> None:
    """Writes the two files into `directory`.

    Raises:
      UserError: the parameters do not fit the model.
      RunError: the disk.
    """
    check_shapes(params, config, model, "the head")
    flat = {
        ".".join(entry.key for entry in path): np.ascontiguousarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    }
    fields = {
        "head": to_dict(config),
        "vocab_size": model.vocab_size,
        "embed_dim": model.embed_dim,
        "base": os.fspath(base.resolve()),
        "digest": base_digest,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(flat, directory / (WEIGHTS + ".partial"))
        (directory / (WEIGHTS + ".partial")).replace(directory / WEIGHTS)
        (directory / FIELDS).write_text(json.dumps(fields, indent=2) + "\n")
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(f"cannot write {directory / WEIGHTS}: {error}") from error


def is_attached(directory: pathlib.Path) -> bool:
    """Whether a directory holds a head."""
    return (directory / FIELDS).is_file()


def load(directory: pathlib.Path) -> Attached:
    """The head in a directory. Raises UserError when it is missing, damaged or of no known kind."""
    path = directory / FIELDS
    try:
        fields = json.loads(path.read_text())
        config = freeze(fields["head"], HeadConfig, "head.")
        base, base_digest = pathlib.Path(fields["base"]), str(fields["digest"])
        model = ModelConfig(vocab_size=fields["vocab_size"], embed_dim=fields["embed_dim"])
    except OSError:
        raise UserError(
            f"{directory} has no CP head; attach one (python -m experiments.cp_heads.attach)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a description of a CP head: {error}") from None
    try:
        flat = safetensors.numpy.load_file(directory / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{directory / WEIGHTS}: not a whole safetensors file: {error}") from None
    params: HeadParams = {}
    for name, array in flat.items():
        part, _, leaf = name.partition(".")
        params.setdefault(part, {})[leaf] = jnp.asarray(array)
    check_shapes(params, config, model, str(directory / WEIGHTS))
    # beside the weights it belongs to them, wherever they have moved
    base = directory if (directory / "config.json").is_file() else base
    return Attached(config, params, base, base_digest, model.vocab_size)


def check(attached: Attached, model: ModelConfig, params: transformer.Params) -> None:
    """Raises UserError unless the head was made for this model and these weights."""
    if attached.vocab_size != model.vocab_size:
        raise UserError(
            f"{attached.base}: its CP head is for a vocabulary of {attached.vocab_size} tokens, "
            f"the model has {model.vocab_size}"
        )
    check_shapes(attached.head, attached.config, model, f"the head on {attached.base}")
    if attached.digest != tuned.digest(params):
        raise UserError(f"{attached.base}: its CP head was made for other weights; attach it anew")


def check_shapes(params: HeadParams, config: HeadConfig, model: ModelConfig, where: str) -> None:
    """Raises UserError naming the first parameter that does not fit the model."""
    head.check(config, model)
    wanted = jax.eval_shape(lambda: head.init(jax.random.key(0), config, model))
    found, wanted = _flat(params), _flat(wanted)
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found or name not in wanted:
            kind = "no" if name not in found else "an unexpected"
            raise UserError(f"{where}: {kind} parameter {name}")
        if found[name].shape != wanted[name].shape:
            raise UserError(
                f"{where}: {name} has shape {list(found[name].shape)}, a model of "
                f"{model.vocab_size} tokens and width {model.embed_dim} needs "
                f"{list(wanted[name].shape)}"
            )


def _flat(params: HeadParams) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}
