# SPDX-License-Identifier: Apache-2.0
"""From a config to what a command works with: tokenizer, template, model shape, parameters.

What `init_from` names decides the architecture; the config keeps the say over dtype and adapters.
"""

import dataclasses
import json
import operator
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp

from lm import checkpoint, lora, sharding, train, transformer
from lm.config import Config, DataConfig, ModelConfig
from lm.data import arithmetic, documents, sources
from lm.data.conversations import Conversation
from lm.data.python_source import Document
from lm.errors import UserError
from lm.hf import weights
from lm.progress import say
from lm.text import chat, tokenizers
from lm.workdir import Workdir

_PYTHON = ("python", "python+site")
VOCAB_MULTIPLE = 128  # tables padded to it divide over devices and fill matrix units
_ARITHMETIC_SIZE = 2000  # training conversations, unless data.limit says otherwise
_BPE_SAMPLE = 2000  # conversations that a trained BPE is learned from
_BPE_FILES = 500  # of a tree of files, evenly spread


@dataclasses.dataclass(frozen=True)
class Setup:
    """A config with everything resolved that depends on files."""

    requested: Config  # as it was given: what config.json records
    config: Config  # `model` as it will be built
    tokenizer: tokenizers.Tokenizer
    template: chat.ChatTemplate
    valid_vocab: int | None  # real tokens, when the table is padded beyond them
    step: int | None = None  # of the checkpoint that its parameters were read from

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def delimiters(self) -> tuple[str, str]:
        return self.config.data.think_open, self.config.data.think_close


def resolve(config: Config, tokenizer_dir: pathlib.Path | None = None) -> Setup:
    """Reads the tokenizer, the template and the shape of `init_from`; allocates no parameters.

    tokenizer_dir: where an earlier run saved the tokenizer that it trained; it wins over training
    again.
    """
    model, spec, valid = config.model, config.data.tokenizer, None
    if config.init_from:
        before = pathlib.Path(config.init_from)
        model, own, valid = _model_of(before, config.model)
        spec = own if spec == "auto" else spec
    tokenizer = _tokenizer(config, "bytes" if spec == "auto" else spec, tokenizer_dir)
    if not model.vocab_size:
        padded = -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        model, valid = dataclasses.replace(model, vocab_size=padded), 0
    if valid is not None:
        valid = max(valid, tokenizer.vocab_size)
        valid = valid if valid < model.vocab_size else None
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model only {model.vocab_size}: they do not belong together"
        )
    template = chat.load_template(config.data.template or None, tokenizer)
    return Setup(config, dataclasses.replace(config, model=model), tokenizer, template, valid)


def _tokenizer(config: Config, spec: str, directory: pathlib.Path | None) -> tokenizers.Tokenizer:
    if not spec.startswith("bpe:"):
        return tokenizers.load_tokenizer(spec)
    if directory is not None and directory.is_dir():
        return tokenizers.load_tokenizer(str(directory))
    try:
        size = int(spec.removeprefix("bpe:"))
    except ValueError:
        raise UserError(f"data.tokenizer={spec!r}: bpe:SIZE takes a number") from None
    # learned from whole renderings, so that the template's own words become tokens too
    source = records(config.data)
    if isinstance(source, sources.DocumentSource) and len(source) > _BPE_FILES:
        source = Spread(source, _BPE_FILES)
    template = chat.load_template(config.data.template or None, tokenizers.load_tokenizer("bytes"))
    texts = (
        text
        for i in range(min(len(source), _BPE_SAMPLE))
        for text in documents.texts_of(source[i], template)
    )
    return tokenizers.train_bpe(texts, size)


def records(data: DataConfig, split: str = "train") -> Sequence[Document] | Sequence[Conversation]:
    """Python files or conversations by index: what plain language-model training reads.

    Splits as for `conversations`. Raises UserError and DataError.
    """
    name, _, directory = data.source.partition(":")
    if name not in _PYTHON or (directory and name != "python"):
        return conversations(data, split)
    source = sources.open_source(
        sources.PythonData(
            directories=(directory,) if directory else (),
            site_packages=name == "python+site",
            split="train" if split == "all" else split,
            validation_fraction=0.0 if split == "all" else data.validation_fraction,
        )
    )
    limit = data.eval_conversations if split == "validation" else data.limit
    return Spread(source, limit) if limit and limit < len(source) else source


def text_rows(
    resolved: Setup,
    split: str = "train",
    *,
    epochs: int | None = 1,
    shuffle: bool = True,
    process: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Packed rows of a config's records as plain text: every token is trained."""
    data = resolved.config.data
    return documents.rows(
        records(data, split),
        resolved.template,
        resolved.tokenizer,
        seq_len=data.seq_len,
        window=data.window,
        seed=data.seed,
        epochs=epochs,
        shuffle=shuffle,
        process=process,
    )


def conversations(data: DataConfig, split: str = "train") -> Sequence[Conversation]:
    """The conversations of a config by index: "train", "validation" (held out) or "all".

    Arithmetic is endless, so "all" of it is its validation set. Raises UserError and DataError.
    """
    if data.source.partition(":")[0] in _PYTHON:
        raise UserError(f"data.source={data.source} is plain text; conversations are needed here")
    whole = split == "all"
    if data.source == "arithmetic":
        settings = arithmetic.ArithmeticConfig(
            min_turns=data.min_turns,
            max_turns=data.max_turns,
            max_number=data.max_number,
            max_operand=data.max_operand,
            tools=data.tools,
        )
        size = (data.limit or _ARITHMETIC_SIZE) if split == "train" else data.eval_conversations
        held = "train" if split == "train" else "validation"
        return sources.open_source(sources.ArithmeticData(size, data.seed, held, settings))
    common = {
        "on_error": data.on_error,
        "split": "train" if whole else split,
        "validation_fraction": 0.0 if whole else data.validation_fraction,
    }
    if data.source.startswith("gsm8k:"):
        path = data.source.removeprefix("gsm8k:")
        spec = sources.Gsm8kData(path, data.max_turns, data.seed, **common)
    else:
        delimiters = (data.think_open, data.think_close)
        spec = sources.FileData(data.source, delimiters=delimiters, **common)
    source = sources.open_source(spec)
    limit = data.eval_conversations if split == "validation" else data.limit
    if not limit or limit >= len(source):
        return source
    if whole:
        say(f"data.limit: the first {limit:,} of {len(source):,} conversations")
    return First(source, limit)


def split_of(trained: Iterable[DataConfig], wanted: DataConfig) -> tuple[str, DataConfig]:
    """What runs may be asked of a source: ("all", as wanted), or ("validation", split as it was in
    training) where any of them was trained on it.

    Raises UserError where they held out different parts of it.
    """
    place = _place(wanted.source)
    found = [_split_as(one, wanted) for one in trained if _place(one.source) == place]
    if not found:
        return "all", wanted
    if any(one != found[0] for one in found):
        raise UserError(
            f"the runs held out different parts of {wanted.source}: evaluate each alone"
        )
    return "validation", found[0]


def _split_as(trained: DataConfig, wanted: DataConfig) -> DataConfig:
    kind = wanted.source.partition(":")[0]
    names = {"arithmetic": (), "gsm8k": ("validation_fraction", "seed", "max_turns")}
    own = {
        name: getattr(trained, name)
        for name in names.get(kind, ("validation_fraction",))
        if getattr(trained, name) != getattr(wanted, name)
    }
    for name, value in own.items():
        say(f"data.{name} is {value!r}, as in training: it decides what was held out")
    return dataclasses.replace(wanted, **own)


def _place(source: str) -> tuple[str, str]:
    """The kind and the resolved path of a source."""
    kind, colon, path = source.partition(":")
    if colon and kind in ("gsm8k", *_PYTHON):
        return kind, os.path.realpath(path)
    return ("", source) if source in ("arithmetic", *_PYTHON) else ("", os.path.realpath(source))


@dataclasses.dataclass(frozen=True)
class Spread(Sequence[Document]):
    """`count` documents of a source, evenly spread: neighbours in a tree of files are alike."""

    source: Sequence[Document]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Document:
        number = operator.index(index)
        if not -self.count <= number < self.count:
            raise IndexError(f"document {number} of {self.count}")
        return self.source[number % self.count * len(self.source) // self.count]


@dataclasses.dataclass(frozen=True)
class First(Sequence[Conversation]):
    """The first `count` conversations of a source."""

    source: Sequence[Conversation]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Conversation:
        number = operator.index(index)
        if not -self.count <= number < self.count:
            raise IndexError(f"conversation {number} of {self.count}")
        return self.source[number % self.count]


def is_hf(path: pathlib.Path) -> bool:
    """Whether a directory is a Hugging Face checkpoint rather than a workdir of ours."""
    try:
        fields = json.loads((path / "config.json").read_text())
    except OSError:
        raise UserError(
            f"{path}: no readable config.json; neither a checkpoint nor a workdir"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}/config.json: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}/config.json: not a JSON object")
    return "architectures" in fields or "model_type" in fields


def _model_of(path: pathlib.Path, wanted: ModelConfig) -> tuple[ModelConfig, str, int | None]:
    """The model of a checkpoint with this config's dtype and adapters, its tokenizer's spec, and
    how many of its tokens are real where its table was padded here."""
    if is_hf(path):
        model, spec, valid = weights.read_config(path), str(path), None
    else:
        own = resolve(Workdir(path).config(), path / "tokenizer")
        # the name is the spec that it was read by, be it that of what this run started from
        model, spec, valid = own.model, own.tokenizer.name, own.valid_vocab
        if (path / "tokenizer").is_dir():
            spec = str(path / "tokenizer")
    return dataclasses.replace(model, dtype=wanted.dtype, lora=wanted.lora), spec, valid


def load_base(setup: Setup) -> transformer.Params | None:
    """The parameters of `init_from` on the host, without this run's own adapters; None for random
    ones."""
    if not setup.config.init_from:
        return None
    path = pathlib.Path(setup.config.init_from)
    if is_hf(path):
        _, params = weights.load(path)
        return params
    return load_workdir(path)[1]


def load_workdir(path: pathlib.Path) -> tuple[Setup, transformer.Params]:
    """The newest checkpoint of a run, adapters merged into the weights."""
    workdir = Workdir(path)
    setup = resolve(workdir.config(), workdir.path / "tokenizer")
    found = restored(setup, workdir)
    model, params = lora.merge_adapters(setup.model, found.params)
    config = dataclasses.replace(setup.config, model=model)
    return dataclasses.replace(setup, config=config, step=found.step), params


class Restored(NamedTuple):
    """What a run trained, adapters kept apart."""

    params: transformer.Params  # the model's, all of them
    beside: transformer.Params  # what was trained beside them
    step: int


def restored(setup: Setup, workdir: Workdir) -> Restored:
    """What the newest readable checkpoint of `workdir` holds, under `setup`.

    A method that trains more than the model stores {"params": the model's, "head": its own}; where
    the model was frozen it stores its own alone, and the model is read where the run found it.
    """
    if not workdir.checkpoints.is_dir():
        raise UserError(f"{workdir.path} has no checkpoint; train first")
    optimizer = train.make_optimizer(setup.config.optimizer, 1)
    store = checkpoint.Checkpoints(workdir.checkpoints)
    try:
        stored = store.stored_params() or {}
        wanted = abstract_trained(setup.model)
        if "head" in stored:
            model = {"params": wanted} if "params" in stored else {}
            wanted = {**model, "head": stored["head"]}
        abstract = jax.eval_shape(lambda p: train.init_state(p, optimizer, 0, None), wanted)
        found = store.restore(abstract)
    finally:
        store.close()
    if found is None:
        raise UserError(f"{workdir.path} has no whole checkpoint; train first")
    trained, beside = found.state.params, {}
    if "head" in stored:
        trained, beside = trained.get("params"), trained["head"]
    if trained is None:
        return Restored(whole_model(setup, None), beside, found.step)
    # in float32, as what a run without adapters restores: they are merged into it
    return Restored(train.merge(trained, _part(setup, None, 1, "float32")), beside, found.step)


def abstract_trained(model: ModelConfig) -> transformer.Params:
    """Shapes of the parameters that training changes."""
    return train.partition(model, transformer.abstract(model)[1])[0]


def trained_params(setup: Setup, mesh: sharding.Sharding | None) -> transformer.Params:
    """The parameters that training changes, at step 0: float32 masters, placed on the mesh."""
    return _part(setup, mesh, which=0, dtype="float32")


def frozen_params(setup: Setup, mesh: sharding.Sharding | None) -> transformer.Params:
    """The parameters beside the adapters, in the compute dtype; {} without adapters."""
    if not setup.model.lora.rank:
        return {}
    return _part(setup, mesh, which=1, dtype=setup.model.dtype)


def whole_model(setup: Setup, mesh: sharding.Sharding | None) -> transformer.Params:
    """Every parameter of a model without adapters, in the compute dtype: a trunk to train on."""
    return _part(setup, mesh, which=0, dtype=setup.model.dtype)


def initial_params(setup: Setup) -> transformer.Params:
    """Every parameter at step 0, float32, on one device: for checks and plans."""
    return train.merge(_part(setup, None, 0, "float32"), _part(setup, None, 1, "float32"))


def _part(setup, mesh, which, dtype):
    model = setup.model
    abstract = train.partition(model, transformer.abstract(model)[1])[which]
    if not abstract:
        return {}
    out = None if mesh is None else mesh.params(abstract)
    base = load_base(setup) if which == 1 or not model.lora.rank else None
    if base is None:
        # init_from adds the adapters it lacks; jit drops whatever is not returned
        def build(key):
            part = train.partition(model, transformer.init(model, key))[which]
            return jax.tree.map(lambda x: x.astype(dtype), part)

        return jax.jit(build, out_shardings=out)(jax.random.key(setup.config.train.seed))
    _check_tree(base, abstract, setup.config.init_from)
    cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), base)
    return cast if out is None else jax.device_put(cast, out)


def _check_tree(base: transformer.Params, abstract: transformer.Params, where: str) -> None:
    try:
        checkpoint.check_shapes(base, abstract, pathlib.Path(where))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
