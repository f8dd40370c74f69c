# SPDX-License-Identifier: Apache-2.0
"""Training a model on long-context tasks: what every paper that works on long contexts starts from.

| loss | what it is |
|---|---|
| `loss_per_token` | what is minimised: answers at weight 1, other text at `tasks.text_weight` |
| `loss_per_turn` | mean over answers of the loss of a token of theirs: retrieval alone |
"""

import functools
import pathlib
import tempfile

import grain

from lm import jobs, loop, setup, sharding, train, transformer
from lm.data import packing
from lm.errors import UserError
from lm.long_context import rows
from lm.long_context.config import LongContextConfig
from lm.progress import say
from lm.text import tokenizers
from lm.workdir import Workdir

_BPE_DOCUMENTS = 1000  # that a tokenizer is learnt from


def run(config: LongContextConfig, workdir: Workdir, profile: bool = False) -> loop.Result:
    """Trains, or goes on training, in `workdir`. Raises UserError and RunError."""
    workdir.create(config)
    check(config)
    resolved = resolve(config, workdir.path / "tokenizer")
    jobs.save_tokenizer(resolved, workdir)
    count = transformer.count_parameters(resolved.model)
    say(f"{count / 1e6:.2f} M parameters, vocabulary {resolved.model.vocab_size}")
    prepared = job(resolved, str(workdir.path / "profile") if profile else "")
    result = loop.fit(prepared, workdir)
    made = packing.statistics(prepared.data)
    if made.get("rows"):
        say(
            f"{made['documents']} documents with {made['answers']} answers in {made['rows']} rows, "
            f"{made['fill']:.1%} full"
        )
    return result


def check(config: LongContextConfig) -> None:
    """Raises UserError for settings that contradict each other."""
    if config.data.source != "tasks":
        raise UserError(
            f"data.source={config.data.source}: a long-context run is trained on tasks.names; "
            'leave it at "tasks"'
        )
    if config.data.limit:
        raise UserError("data.limit has no meaning here: documents of tasks have no end")
    if not config.train.steps:
        raise UserError("train.steps=0 (epochs): documents of tasks have no end; set train.steps")
    if config.train.verify_every:
        raise UserError("train.verify_every checks conversations; there are none here")
    if config.train.weighting == "per_turn" and config.tasks.text_weight:
        raise UserError("train.weighting=per_turn trains answers alone: set tasks.text_weight=0")
    if config.init_from and config.data.tokenizer != "auto":
        raise UserError("init_from brings a tokenizer of its own: data.tokenizer=auto takes it")


def resolve(config: LongContextConfig, directory: pathlib.Path | None = None) -> setup.Setup:
    """As `lm.setup.resolve`, with "bpe:SIZE" learnt from documents of the tasks.

    directory: where an earlier run saved the tokenizer that it learnt.
    """
    spec = config.data.tokenizer
    known = directory is not None and directory.is_dir()
    if known or not spec.startswith("bpe:"):
        return setup.resolve(config, directory)
    try:
        size = int(spec.removeprefix("bpe:"))
    except ValueError:
        raise UserError(f"data.tokenizer={spec!r}: bpe:SIZE takes a number") from None
    plain = tokenizers.load_tokenizer("bytes")
    texts = rows.texts(config.tasks, plain, config.data.seed, _BPE_DOCUMENTS)
    with tempfile.TemporaryDirectory() as kept:
        tokenizers.train_bpe(texts, size).save(kept)
        return setup.resolve(config, pathlib.Path(kept))


def job(resolved: setup.Setup, profile: str = "") -> loop.Job:
    """The job of a resolved `LongContextConfig`."""
    config: LongContextConfig = resolved.config
    model = config.model
    mesh = sharding.make(config.mesh, model)
    jobs.check_batch(config, mesh)
    if profile:
        jobs.check_profile(config)
    execution = jobs.execution_of(resolved, mesh)
    return loop.Job(
        config=config,
        requested=resolved.requested,
        objective=train.edge_objective(model, execution, config.train.weighting),
        initial=lambda: setup.trained_params(resolved, mesh),
        abstract=setup.abstract_trained(model),
        frozen=setup.frozen_params(resolved, mesh),
        data=iter(data_of(resolved)),
        total_steps=config.train.steps,
        sharding=mesh,
        flops=functools.partial(jobs.batch_flops, model),
        profile=profile,
    )


def data_of(resolved: setup.Setup) -> grain.IterDataset:
    """Batches of packed documents without an end."""
    config: LongContextConfig = resolved.config
    process = jobs.processes(config)
    packed = rows.rows(
        config.tasks,
        resolved.tokenizer,
        seed=config.data.seed,
        seq_len=config.data.seq_len,
        window=config.data.window,
        process=process,
    )
    return packing.batches(packed, config.train.batch_size // process[1], config.data.seq_len)
