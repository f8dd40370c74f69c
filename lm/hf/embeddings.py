# SPDX-License-Identifier: Apache-2.0
"""New tokens for a model that exists: rows of the embedding tables that start at the mean."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError


def resize_embeddings(
    config: ModelConfig,
    params: Mapping[str, Any],
    new_vocab_size: int,
    *,
    used: int | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Grows the input and output tables [V, D] to `new_vocab_size` rows.

    A new row is the mean of the rows in use: a new token starts out as likely as the average one
    and close to where the others lie, so that the model's predictions hardly move.

    Args:
      config: of the model as it is.
      params: nested dict of arrays; not modified. Tables stay numpy or JAX, in their dtype.
      new_vocab_size: at least the present one.
      used: how many leading rows belong to tokens. Rows behind them are padding, are left out of
        the mean and become new rows. None: all present rows.

    Returns:
      The config with the new vocabulary, and the parameters.

    Raises:
      UserError: fewer rows than there are, or `used` outside 1..V.
    """
    present = config.vocab_size
    used = present if used is None else used
    if new_vocab_size < present:
        raise UserError(f"cannot shrink a vocabulary of {present} to {new_vocab_size}")
    if not 1 <= used <= present:
        raise UserError(f"{used} rows in use of a vocabulary of {present}")
    tables = ("embed",) if config.tied_embeddings else ("embed", "unembed")
    resized = {
        name: {"table": _grow(params[name]["table"], new_vocab_size, used)} for name in tables
    }
    return dataclasses.replace(config, vocab_size=new_vocab_size), {**params, **resized}


def _grow(table: Any, rows: int, used: int) -> Any:
    library = jnp if isinstance(table, jax.Array) else np
    mean = table[:used].astype(np.float32).mean(axis=0, keepdims=True).astype(table.dtype)
    new = library.broadcast_to(mean, (rows - used, table.shape[1]))
    return library.concatenate([table[:used], new])
