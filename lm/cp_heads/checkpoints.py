# SPDX-License-Identifier: Apache-2.0
"""A model with its CP head, from a run's workdir or from a Hugging Face directory with a head."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import lora, setup, transformer, tuned
from lm.config import ModelConfig
from lm.cp_heads import attach, head
from lm.cp_heads.config import CpConfig
from lm.cp_heads.head import HeadConfig, HeadParams
from lm.errors import UserError
from lm.hf import weights
from lm.setup import Setup
from lm.workdir import Workdir

DRAFT_VOCAB = "draft_vocab.json"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, adapters merged, and its head."""

    setup: Setup  # its config is a `CpConfig`
    params: transformer.Params
    head_config: HeadConfig
    head: HeadParams

    @property
    def model(self) -> ModelConfig:
        return self.setup.model


def load(path: pathlib.Path, config: CpConfig | None = None) -> Loaded:
    """The newest checkpoint of a run, or a Hugging Face directory with the head attached to it (or
    the directory where such a head lies by itself).

    config: with a Hugging Face directory, where data, dtype and the like come from.

    Raises:
      UserError: there is no head, or it is of another model.
    """
    if attach.is_attached(path) or setup.is_hf(path):
        attached = attach.load(path)
        config = config or CpConfig()
        config = dataclasses.replace(config, init_from=str(attached.base), head=attached.config)
        resolved = setup.resolve(config)
        params = setup.load_base(resolved)
        attach.check(attached, resolved.model, params)
        return Loaded(resolved, params, attached.config, attached.head)
    resolved, params, made = load_run(path)
    if made is None:
        raise UserError(f"{path} has no CP head: train one on it (loss.mode=heads, init_from)")
    return Loaded(resolved, params, resolved.config.head, made)


def load_run(path: pathlib.Path) -> tuple[Setup, transformer.Params, HeadParams | None]:
    """The newest checkpoint of a run, adapters merged, and its head if it has one."""
    workdir = Workdir(path)
    resolved = setup.resolve(workdir.config(CpConfig), workdir.path / "tokenizer")
    params, made, _ = setup.restored(resolved, workdir)
    model, params = lora.merge_adapters(resolved.model, params)
    config: CpConfig = dataclasses.replace(resolved.config, model=model)
    resolved = dataclasses.replace(resolved, config=config)
    if not made:
        return resolved, params, None
    made = with_draft_vocab(made, config.head, path)
    attach.check_shapes(made, config.head, model, str(path))
    return resolved, params, made


def head_of(path: pathlib.Path) -> tuple[HeadConfig, HeadParams] | None:
    """The head of a workdir or of a Hugging Face directory; None where there is none."""
    if setup.is_hf(path):
        attached = attach.load(path) if attach.is_attached(path) else None
        return None if attached is None else (attached.config, attached.head)
    resolved, _, made = load_run(path)
    return None if made is None else (resolved.config.head, made)


def with_draft_vocab(params: HeadParams, config: HeadConfig, path: pathlib.Path) -> HeadParams:
    """The head with the draft vocabulary that its run kept."""
    if not config.draft_vocab:
        return params
    ids = read_draft_vocab(path)
    if ids is None:
        raise UserError(f"{path}: no {DRAFT_VOCAB}, which says what the head's outputs are")
    return {**params, "vocab": {"ids": jnp.asarray(ids)}}


def read_draft_vocab(path: pathlib.Path) -> np.ndarray | None:
    """The ids [V'] int32 that a run kept; None without."""
    file = path / DRAFT_VOCAB
    if not file.is_file():
        return None
    try:
        return np.array(json.loads(file.read_text()), np.int32)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: {error}") from None


def attach_run(base: pathlib.Path, run: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """Saves the head of a run for the Hugging Face directory that holds the run's model.

    Raises:
      UserError: the run has no head, or its model is not the one in `base`.
    """
    resolved, params, made = load_run(run)
    if made is None:
        raise UserError(f"{run} has no CP head")
    model, own = weights.load(base)
    config = resolved.config.head
    attach.check_shapes(made, config, model, f"the head of {run}")
    found = tuned.digest(own)
    if found != tuned.digest(params):
        raise UserError(
            f"{run} trained other weights than those of {base}: export them "
            "(python -m experiments.export) and attach the head to that directory"
        )
    attach.save(out, base, config, made, model, found)
    return _saved(out, config, made, trained=True)


def attach_random(base: pathlib.Path, config: CpConfig, out: pathlib.Path) -> dict[str, Any]:
    """Saves a random head of the config's shape: it drafts badly, but takes the time of a trained
    one."""
    model, own = weights.load(base)
    made = head.init(jax.random.key(config.train.seed), config.head, model)
    attach.save(out, base, config.head, made, model, tuned.digest(own))
    return _saved(out, config.head, made, trained=False)


def _saved(out: pathlib.Path, config: HeadConfig, made: HeadParams, trained: bool):
    return {
        "head": str(out / attach.WEIGHTS),
        "rank": config.rank,
        "predicted": config.predicted,
        "parameters": sum(x.size for x in jax.tree.leaves(made)),
        "trained": trained,
    }
