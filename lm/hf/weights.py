# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoint directories: config.json and safetensors, sharded or not.

Only safetensors are read. Pickled weights can run code when they are opened, and are refused.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lm.config import ModelConfig
from lm.errors import UserError
from lm.hf import configs, families
from lm.hf.families import Family, Tensor
from lm.text.chat import ChatTemplate
from lm.text.tokenizers import Tokenizer

Params = dict[str, Any]
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = ("F32", "F16", "BF16")
# Old checkpoints store rotary frequencies, which follow from the config.
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
SHARD_BYTES = 5_000_000_000


def read_config(hf_dir: str | Path) -> ModelConfig:
    """The model of a checkpoint directory; UserError as `configs.config_from_hf`."""
    path = Path(hf_dir) / "config.json"
    try:
        return configs.config_from_hf(read_fields(hf_dir), str(path))
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # a field of another type
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None


def read_fields(hf_dir: str | Path) -> dict[str, Any]:
    """config.json as it is."""
    path = Path(hf_dir) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: not a JSON object")
    return fields


def load(
    hf_dir: str | Path,
    dtype: str | None = None,
    place: Callable[[tuple[str, ...], np.ndarray], Any] | None = None,
) -> tuple[ModelConfig, Params]:
    """The config and the parameters of a checkpoint, as the nested dict of `lm.transformer`.

    Layers are stacked straight from the mapped files, one parameter after the other, so that the
    host holds no second copy of the model.

    Args:
      hf_dir: directory with config.json and safetensors.
      dtype: of the arrays; None keeps the stored one (float32 where layers differ).
      place: called with (path, array) as soon as a parameter is whole; what it returns is kept
        instead, so that an array can move to its devices before the next is read.

    Raises:
      UserError: no safetensors; an unsupported model; a missing, unexpected or mis-shaped tensor.
    """
    hf_dir = Path(hf_dir)
    fields = read_fields(hf_dir)
    config = read_config(hf_dir)
    family = families.of_fields(fields, str(hf_dir))
    with _Checkpoint(hf_dir) as checkpoint:
        _check(checkpoint, family, config)
        params: Params = {}
        for row in family.tensors(config):
            array = _read(checkpoint, row, config, dtype)
            _insert(params, row.path, array if place is None else place(row.path, array))
    return config, params


def save(
    hf_dir: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    family: str | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    template: ChatTemplate | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    max_positions: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint directory that `transformers` and `load` read.

    Args:
      hf_dir: made when it does not exist.
      config: the model, adapters merged.
      params: nested dict of arrays, as in `lm.transformer`.
      family: architecture to export as; None takes one that can hold the model.
      tokenizer: saved beside the weights.
      template: saved with it in place of its own.
      dtype: of the stored tensors; None keeps that of the arrays.
      shard_bytes: a file holds no more, unless one tensor alone is larger.
      max_positions: the longest sequence that config.json declares.
      overwrite: replace weights that are in the directory already.

    Raises:
      UserError: the family cannot hold the model; the parameters do not fit the config; the
        directory holds weights already.
    """
    hf_dir = Path(hf_dir)
    chosen = families.of_model(config) if family is None else families.named(family)
    fields = configs.config_to_hf(config, chosen, max_positions=max_positions)
    flat = _flatten(params)
    _check_params(flat, chosen, config)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
        )
    stored = jnp.dtype(dtype or _common_dtype(flat.values())).name
    hf_dir.mkdir(parents=True, exist_ok=True)
    _clear(hf_dir, overwrite)
    _write_shards(hf_dir, _Writer(chosen, config, flat, dtype), shard_bytes)
    fields |= {"dtype": stored, "torch_dtype": stored}  # transformers 5 and 4
    if tokenizer is not None:
        fields |= _save_tokenizer(hf_dir, tokenizer, template)
    # The config comes last: a directory without one is not mistaken for a whole checkpoint.
    _write_json(hf_dir / "config.json", fields)


class _Checkpoint:
    """The tensors of a directory by name, whatever files they lie in."""

    def __init__(self, hf_dir: Path):
        self._files = {path: _open(path) for path in _weight_files(hf_dir)}
        self._home = {name: path for path, file in self._files.items() for name in file.keys()}  # noqa: SIM118
        self.where = str(hf_dir)

    def __enter__(self) -> "_Checkpoint":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._files.clear()  # closes the maps

    @property
    def names(self) -> Iterable[str]:
        return self._home.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors spells it."""
        return self._slice(name).get_dtype()

    def array(self, name: str) -> np.ndarray:
        return self._files[self._home[name]].get_tensor(name)

    def _slice(self, name: str) -> Any:
        return self._files[self._home[name]].get_slice(name)


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from None


def _weight_files(hf_dir: Path) -> list[Path]:
    if (hf_dir / _SINGLE).is_file():
        return [hf_dir / _SINGLE]
    index = hf_dir / _INDEX
    if not index.is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in hf_dir.glob(pattern))
        if pickles:
            raise UserError(
                f"{hf_dir}: only pickled weights ({pickles[0]}), which are never opened: they can "
                "run code; convert them to safetensors (save_pretrained of transformers does)"
            )
        raise UserError(f"{hf_dir}: neither {_SINGLE} nor {_INDEX}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no readable weight_map: {error}") from None
    for name in names:
        if Path(name).name != name or not (hf_dir / name).is_file():
            raise UserError(f"{index}: names {name}, which is not a file beside it")
    return [hf_dir / name for name in names]


def _check(checkpoint: _Checkpoint, family: Family, config: ModelConfig) -> None:
    """Every tensor is there, in the right shape and a known dtype, and no other."""
    wanted = families.expected(family, config)
    names = {name for name in checkpoint.names if not _DERIVED.fullmatch(name)}
    head = "lm_head.weight"
    embed = "model.embed_tokens.weight"
    if config.tied_embeddings and {head, embed} <= names:
        # Some exports repeat the tied table. Another table would mean another model.
        names.remove(head)
        if not np.array_equal(checkpoint.array(head), checkpoint.array(embed)):
            raise UserError(
                f"{checkpoint.where}: {head} differs from {embed}, "
                "though tie_word_embeddings is true"
            )
    for kind, found in (("missing", wanted.keys() - names), ("unexpected", names - wanted.keys())):
        if found:
            raise UserError(f"{checkpoint.where}: {kind} tensor{_some(found)}")
    for name, (row, _) in wanted.items():
        shape = row.their_shape(config)
        if checkpoint.shape(name) != shape:
            raise UserError(
                f"{checkpoint.where}: tensor {name} has shape {list(checkpoint.shape(name))}; "
                f"config.json asks for {list(shape)}"
            )
        if checkpoint.dtype(name) not in _DTYPES:
            raise UserError(
                f"{checkpoint.where}: tensor {name} is stored as {checkpoint.dtype(name)}; "
                f"supported are {', '.join(_DTYPES)}"
            )


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ("s " if len(names) > 1 else " ") + ", ".join(names[:limit]) + more


def _read(
    checkpoint: _Checkpoint, row: Tensor, config: ModelConfig, dtype: str | None
) -> np.ndarray:
    """One parameter [...] or [L, ...]."""
    layers = range(config.num_layers) if row.per_layer else (None,)
    names = [row.name.format(layer=layer) for layer in layers]
    if dtype is None:
        kinds = {checkpoint.dtype(name) for name in names}
        dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[
            kinds.pop() if len(kinds) == 1 else "F32"
        ]
    out = np.empty((len(names), *row.our_shape(config)), jnp.dtype(dtype))
    for i, name in enumerate(names):
        out[i] = row.to_ours(checkpoint.array(name), config)
    return out if row.per_layer else out[0]


def _insert(params: Params, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value


def _flatten(params: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def _check_params(flat: Mapping[tuple[str, ...], Any], family: Family, config: ModelConfig) -> None:
    wanted = {
        row.path: ((config.num_layers,) if row.per_layer else ()) + row.our_shape(config)
        for row in family.tensors(config)
    }
    for kind, found in (
        ("missing", wanted.keys() - flat.keys()),
        ("unexpected", flat.keys() - wanted.keys()),
    ):
        if found:
            raise UserError(f"{kind} parameter{_some('/'.join(path) for path in found)}")
    for path, shape in wanted.items():
        if flat[path].shape != shape:
            name, actual = "/".join(path), list(flat[path].shape)
            raise UserError(
                f"parameter {name} has shape {actual}; the config asks for {list(shape)}"
            )


def _common_dtype(arrays: Iterable[Any]) -> np.dtype:
    dtypes = {np.dtype(array.dtype) for array in arrays}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


class _Writer:
    """Tensors by name, made when a shard asks for them."""

    def __init__(self, family: Family, config: ModelConfig, flat: Mapping, dtype: str | None):
        self._rows = families.expected(family, config)
        self._config, self._flat = config, flat
        self._dtype = None if dtype is None else jnp.dtype(dtype)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Names and bytes."""
        for name, (row, _) in self._rows.items():
            itemsize = (self._dtype or np.dtype(self._flat[row.path].dtype)).itemsize
            yield name, itemsize * int(np.prod(row.their_shape(self._config)))

    def array(self, name: str) -> np.ndarray:
        row, layer = self._rows[name]
        array = self._flat[row.path]
        array = np.asarray(array if layer is None else array[layer])
        if self._dtype is not None:
            array = array.astype(self._dtype)
        return row.to_theirs(array, self._config)


def _write_shards(hf_dir: Path, writer: _Writer, shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    total = filled = 0
    for name, size in writer.sizes():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        total, filled = total + size, filled + size
    count, weight_map = len(shards), {}
    for i, names in enumerate(shards, start=1):
        file = _SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
        tensors = {name: writer.array(name) for name in names}
        # transformers refuses files that do not say which framework's layout they follow
        safetensors.numpy.save_file(tensors, hf_dir / (file + ".tmp"), metadata={"format": "pt"})
        os.replace(hf_dir / (file + ".tmp"), hf_dir / file)
        weight_map |= dict.fromkeys(names, file)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(hf_dir / _INDEX, index)


def _clear(hf_dir: Path, overwrite: bool) -> None:
    """Weights of an earlier save would be read in place of, or beside, the new ones."""
    shards = hf_dir.glob("model-*-of-*.safetensors")
    old = [path for path in (hf_dir / _SINGLE, hf_dir / _INDEX, *shards) if path.exists()]
    if old and not overwrite:
        raise UserError(f"{hf_dir}: holds {old[0].name} already; choose another directory")
    for path in old:
        path.unlink()


def _save_tokenizer(
    hf_dir: Path, tokenizer: Tokenizer, template: ChatTemplate | None
) -> dict[str, int]:
    """Saves it and returns the ids for config.json; generation stops at the ends of turns too."""
    tokenizer.save(hf_dir, None if template is None else template.stored())
    named = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    named["pad_token_id"] = tokenizer.pad
    ids = {key: tokenizer.token_id(token) for key, token in named.items() if token is not None}
    stops = {"eos_token_id": list(tokenizer.stop_ids)} if tokenizer.stop_ids else {}
    _write_json(hf_dir / "generation_config.json", ids | stops)
    return ids


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
