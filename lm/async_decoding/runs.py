# SPDX-License-Identifier: Apache-2.0
"""From a config to what async decoding works with: conversations, a tokenizer that has the tags, a
model that has rows for them."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from lm import checkpoint, jobs, lora, setup, sharding, studies, transformer
from lm.async_decoding import language, requests
from lm.async_decoding.config import RunConfig
from lm.config import LoraConfig
from lm.data import sources
from lm.data.conversations import Conversation
from lm.errors import UserError
from lm.hf import embeddings, weights
from lm.text import chat, tokenizers
from lm.text.tokenizers import Tokenizer
from lm.workdir import Workdir

ROUND = "round_"  # workdirs of preference optimisation lie in that of the whole, by number
_SIZE = 20_000  # requests to train on, unless data.limit says otherwise
_BPE_SAMPLE = 2000  # conversations that a trained BPE is learned from


@dataclasses.dataclass(frozen=True)
class Run:
    """A resolved config, and the vocabulary that its model started from."""

    setup: setup.Setup  # its config is a `RunConfig`, its tokenizer has the tags
    base: setup.Setup  # as `init_from` is: without the tags, unless it has them
    new_tags: bool  # the model of `init_from` has no rows for the tags yet

    @property
    def config(self) -> RunConfig:
        return self.setup.config


def conversations(config: RunConfig, split: str = "train") -> Sequence[Conversation]:
    """The conversations of a config by index: "train", "validation" (held out) or "all".

    Requests are endless, so "all" of them is the validation set. Raises UserError and DataError.
    """
    data = config.data
    if data.source != "requests":
        return setup.conversations(data, split)
    held_out = split != "train"
    size = data.eval_conversations if held_out else data.limit or _SIZE
    return sources.open_source(requests.RequestData(size, data.seed, held_out, config.requests))


def resolve(config: RunConfig, tokenizer_dir: pathlib.Path | None = None) -> Run:
    """Reads the tokenizer, adds the tags, and finds the model's shape; allocates no parameters.

    tokenizer_dir: where an earlier run saved its tokenizer; it wins over training one again.
    """
    if config.init_from:
        config = dataclasses.replace(config, init_from=str(newest(pathlib.Path(config.init_from))))
    own = _own_tokenizer(config, tokenizer_dir)
    plain = config
    if own is not None:  # `setup` knows neither our data nor our tags
        plain = dataclasses.replace(
            config, data=dataclasses.replace(config.data, tokenizer="bytes")
        )
    base = setup.resolve(plain)
    known = own or base.tokenizer
    if own is not None and config.init_from:
        _check_tokenizer(config, own)
    tokenizer = known.add_tokens(language.TAGS)
    new_tags = bool(config.init_from) and known.token_id(language.SYNC) is None
    size, model, valid = tokenizer.vocab_size, base.model, base.valid_vocab
    padded = -(-size // setup.VOCAB_MULTIPLE) * setup.VOCAB_MULTIPLE
    if config.init_from:
        if size > model.vocab_size:
            model = dataclasses.replace(model, vocab_size=padded)
        before = pathlib.Path(config.init_from)
        own = (before / studies.RUN).exists()  # its table was padded here
        imported = setup.is_hf(before) and model == base.model and not own
        valid = None if imported or size == model.vocab_size else size
    elif not config.model.vocab_size:
        model = dataclasses.replace(model, vocab_size=padded)
        valid = None if size == padded else size
    elif size > model.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} has no room for {size} tokens, tags included; "
            "0 takes what is needed"
        )
    if new_tags and config.model.lora.rank:
        raise UserError(
            "adapters cannot learn new tokens, since the embeddings stay as they are: train the "
            "whole model (model.lora.rank=0), or start from a model that has the tags"
        )
    resolved = setup.Setup(
        requested=config,
        config=dataclasses.replace(config, model=model),
        tokenizer=tokenizer,
        template=chat.load_template(config.data.template or None, tokenizer),
        valid_vocab=valid,
    )
    return Run(resolved, base, new_tags)


def _own_tokenizer(config: RunConfig, directory: pathlib.Path | None) -> Tokenizer | None:
    """The tokenizer that this run trains, or trained; None where `setup` finds it."""
    spec = config.data.tokenizer
    if not spec.startswith("bpe:"):
        return None
    if directory is not None and directory.is_dir():
        return tokenizers.load_tokenizer(str(directory))
    try:
        size = int(spec.removeprefix("bpe:"))
    except ValueError:
        raise UserError(f"data.tokenizer={spec!r}: bpe:SIZE takes a number") from None
    template = chat.load_template(config.data.template or None, tokenizers.load_tokenizer("bytes"))
    return tokenizers.train_bpe(_texts(conversations(config), template), size)


def _check_tokenizer(config: RunConfig, own: Tokenizer) -> None:
    """Raises UserError when a BPE that was just trained is not that of `init_from`."""
    auto = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="auto"))
    found = setup.resolve(auto).tokenizer
    if len({one.add_tokens(language.TAGS).fingerprint for one in (own, found)}) > 1:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} gives other tokens than that of "
            f"{config.init_from}; data.tokenizer=auto takes its own"
        )


def _texts(source: Sequence[Conversation], template: chat.ChatTemplate) -> Iterator[str]:
    """Whole renderings without tags, so that the template's own words become tokens, too."""
    for index in range(min(len(source), _BPE_SAMPLE)):
        conversation = source[index]
        for thread in conversation.threads():
            messages = [message.to_dict(with_thought=True) for message in thread]
            for message in messages:
                if message["role"] == "assistant":
                    message["content"] = without_tags(message["content"])
            yield template.render(messages, add_generation_prompt=False, tools=conversation.tools)


def without_tags(content: str) -> str:
    """An answer as a reader sees it; one that is no program as it is written."""
    try:
        return language.render(language.parse(content))
    except language.LanguageError:
        return content


def trained_params(run: Run, mesh: sharding.Sharding | None) -> transformer.Params:
    """What training changes, at step 0: that of `init_from`, where tags are new rows at the mean of
    the others, or random; float32, placed on the mesh."""
    if not run.new_tags:
        return setup.trained_params(run.setup, mesh)
    params = setup.load_base(run.base)
    used = min(run.base.tokenizer.vocab_size, run.base.model.vocab_size)
    size = run.setup.model.vocab_size
    _, params = embeddings.resize_embeddings(run.base.model, params, size, used=used)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return params if mesh is None else jax.device_put(params, mesh.params(params))


def save_tokenizer(run: Run, workdir: Workdir) -> None:
    """Keeps the tokenizer with its tags, of whatever kind it is: their ids belong to the model."""
    directory = workdir.path / "tokenizer"
    if not directory.is_dir() and not jax.process_index():
        jobs.save_whole(run.setup.tokenizer, directory)


def newest(path: pathlib.Path) -> pathlib.Path:
    """The workdir with the weights: this one, or of preference optimisation the last round's that
    has any."""
    found = [one for one in path.glob(f"{ROUND}*") if one.name.removeprefix(ROUND).isdigit()]
    found.sort(key=lambda one: int(one.name.removeprefix(ROUND)), reverse=True)
    return next((one for one in found if checkpoint.any_whole(one / "checkpoints")), path)


def has_threads(path: pathlib.Path) -> bool:
    """Whether a run, or what `lm.studies` kept of one, is of async decoding."""
    return (path / studies.RUN).exists() or "threads" in Workdir(newest(path)).sections()


def config_at(path: pathlib.Path) -> RunConfig:
    """The config of a run, or of what `lm.studies` kept of one. Raises UserError, also for a run of
    another method."""
    if not has_threads(path):
        raise UserError(f"{path} is the run of another method: it was not trained for threads")
    if (path / studies.RUN).exists():
        return studies.config_of(path, RunConfig)
    return Workdir(newest(path)).config(RunConfig)


def load(path: pathlib.Path) -> tuple[Run, transformer.Params]:
    """The newest checkpoint of a run, or what `lm.studies` kept of one, adapters merged into the
    weights.

    Raises UserError when it is of another method.
    """
    if (path / studies.RUN).exists():
        return _kept(path)
    workdir = Workdir(newest(path))
    run = resolve(config_at(path), workdir.path / "tokenizer")
    params = setup.restored(run.setup, workdir).params
    model, params = lora.merge_adapters(run.setup.model, params)
    config = dataclasses.replace(run.setup.config, model=model)
    return dataclasses.replace(run, setup=dataclasses.replace(run.setup, config=config)), params


def _kept(path: pathlib.Path) -> tuple[Run, transformer.Params]:
    config = studies.config_of(path, RunConfig)
    config = dataclasses.replace(
        config,
        init_from=str(path),
        model=dataclasses.replace(config.model, lora=LoraConfig()),
        data=dataclasses.replace(config.data, tokenizer="auto"),
    )
    _, params = weights.load(path)
    return resolve(config), jax.tree.map(jnp.asarray, params)
