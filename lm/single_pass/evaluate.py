# SPDX-License-Identifier: Apache-2.0
"""Multi-turn generation on held-out conversations, and their teacher-forced loss, by depth.

Every conversation is answered message by message, all of them in one batch (`dialogues`). Only main
threads are generated; the loss is over all threads.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lm import generate, losses, setup, sharding, train
from lm.config import Config, DataConfig
from lm.data import packing
from lm.data.conversations import Conversation
from lm.data.layout import Layout
from lm.errors import UserError
from lm.progress import Progress, say
from lm.single_pass import layouts, pipeline, samples
from lm.single_pass.dialogues import Dialogue, Reply, Transcript, depths_of
from lm.transformer import Params
from lm.workdir import Workdir

_LOSS_TOKENS = 32768  # of a teacher-forced batch, padding included


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one model did on one set of conversations."""

    rows: list[dict[str, Any]]  # depth, exact_match, loss, n (scored answers), unclosed thoughts
    exact_match: float  # over all scored answers; NaN without any
    loss: float  # nats per trained token, over all depths
    n: int
    transcripts: list[Transcript]
    timing: generate.Timing  # of the first turn's first batch
    timed_sequences: int  # in that batch


@dataclasses.dataclass(frozen=True)
class Options:
    """How to evaluate, beside what the setup's config says."""

    mesh: sharding.Sharding | None = None
    implementation: str | None = None
    batch_size: int = 64  # conversations generated together
    seed: int = 0


def evaluate(
    resolved: setup.Setup,
    params: Params,
    conversations: Sequence[Conversation],
    options: Options = Options(),
) -> Evaluation:
    """Generates every turn of every conversation under `resolved.config.sampling`, and scores.

    Raises:
      UserError: no conversations, or `batch_size` below 1.
      DataError: the template cannot show a conversation.
    """
    if not len(conversations):
        raise UserError("nothing to evaluate: no conversations")
    if options.batch_size < 1:
        raise UserError(f"batch_size={options.batch_size} must be at least 1")
    params = generate.cast(resolved.model, params)
    found = [pipeline.samples_of(resolved, conversation) for conversation in conversations]
    loss, weight = held_out_loss(resolved, params, found, options)
    dialogues = [
        Dialogue(resolved, conversation, index, own)
        for index, (conversation, own) in enumerate(zip(conversations, found, strict=True))
    ]
    first = [dialogue.prompt() for dialogue in dialogues if dialogue.open][: options.batch_size]
    if not first:
        raise UserError("nothing to evaluate: no main thread has a message to generate")
    _generate(resolved, params, dialogues, options)
    timing = generate.measure(
        resolved.model,
        params,
        first,
        resolved.config.sampling,
        jax.random.key(options.seed),
        sharding=options.mesh,
        implementation=options.implementation,
        valid_vocab=resolved.valid_vocab,
    )
    transcripts = [dialogue.transcript() for dialogue in dialogues]
    replies = [reply for transcript in transcripts for reply in transcript.replies]
    scored = [reply.correct for reply in replies if reply.correct is not None]
    return Evaluation(
        rows=_rows(replies, loss, weight),
        exact_match=_mean(scored),
        loss=sum(loss.values()) / sum(weight.values()),
        n=len(scored),
        transcripts=transcripts,
        timing=timing,
        timed_sequences=len(first),
    )


def run(
    config: Config, workdir: Workdir, options: Options = Options()
) -> tuple[dict[str, Any], list[Transcript]]:
    """Evaluates the newest checkpoint of a run and appends its rows to eval.jsonl.

    The model, tokenizer and template are the run's own, the rest is `config`'s. Of the source that
    the run was trained on, only what it held out is used; of any other, everything.

    Raises UserError and DataError.
    """
    if jax.process_count() > 1:
        raise UserError("evaluate runs on one process")
    trained, params = setup.load_workdir(workdir.path)
    split, data = setup.split_of([trained.config.data], config.data)
    config = _with_formats_of(trained.config.data, dataclasses.replace(config, data=data))
    resolved = dataclasses.replace(trained, config=dataclasses.replace(config, model=trained.model))
    mesh = sharding.make(config.mesh, resolved.model)
    if mesh is not None:
        params = jax.device_put(params, mesh.params(params))
    source = setup.conversations(config.data, split)
    count = min(len(source), config.data.eval_conversations)
    if count < len(source):
        say(f"evaluating {count} of {len(source)} conversations (data.eval_conversations)")
    found = evaluate(
        resolved,
        params,
        [source[index] for index in range(count)],
        dataclasses.replace(options, mesh=mesh),
    )
    known = {
        "method": trained.config.data.mode,
        "setting": _setting(config),
        "seed": options.seed,
        "step": trained.step,
    }
    measured = found.timing.summary(found.timed_sequences)
    for row in found.rows:
        workdir.append("eval.jsonl", without_nan(known | row | measured))
    whole = {"exact_match": found.exact_match, "loss": found.loss, "n": found.n}
    return {"rows": found.rows} | whole | known | measured, found.transcripts


def _with_formats_of(trained: DataConfig, config: Config) -> Config:
    """`config` with the text formats that the model knows; another thought policy is a choice."""
    formats = ("tokenizer", "template", "think_open", "think_close")
    own = {name: getattr(trained, name) for name in formats}
    for name, value in own.items():
        if value != getattr(config.data, name):
            say(f"data.{name} is {value!r}, as in training, not {getattr(config.data, name)!r}")
    if trained.policy != config.data.policy:
        say(f"data.policy is {config.data.policy!r}; training had {trained.policy!r}")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **own))


def _setting(config: Config) -> str:
    """In words, what else than the model decides the answers."""
    drawn = config.sampling
    if not drawn.temperature:
        return f"{config.data.policy}, greedy"
    parts = [f"temperature {drawn.temperature:g}"]
    parts += [f"top_k {drawn.top_k}"] if drawn.top_k else []
    parts += [f"top_p {drawn.top_p:g}"] if drawn.top_p < 1 else []
    return ", ".join([config.data.policy, *parts])


def without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: null stands for what there was nothing to measure of."""
    nan = {key for key, value in row.items() if isinstance(value, float) and math.isnan(value)}
    return {key: None if key in nan else value for key, value in row.items()}


def _rows(
    replies: Sequence[Reply], loss: dict[int, float], weight: dict[int, float]
) -> list[dict[str, Any]]:
    rows = []
    for depth in sorted({reply.depth for reply in replies} | set(loss)):
        here = [reply for reply in replies if reply.depth == depth]
        scored = [reply.correct for reply in here if reply.correct is not None]
        rows.append(
            {
                "depth": depth,
                "exact_match": _mean(scored),
                "loss": loss[depth] / weight[depth] if weight.get(depth) else math.nan,
                "n": len(scored),
                "unclosed": sum(not reply.closed for reply in here),
                "cut_off": sum(not reply.stopped for reply in here),
            }
        )
    return rows


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan


def _generate(
    resolved: setup.Setup, params: Params, dialogues: Sequence[Dialogue], options: Options
) -> None:
    """Writes the next message of all open dialogues in one batch, until none is open."""
    key = jax.random.key(options.seed)
    with Progress("messages", None) as progress:
        for step in itertools.count():
            open_ones = [dialogue for dialogue in dialogues if dialogue.open]
            if not open_ones:
                return
            for start in range(0, len(open_ones), options.batch_size):
                batch = open_ones[start : start + options.batch_size]
                generations = generate.generate(
                    resolved.model,
                    params,
                    [dialogue.prompt() for dialogue in batch],
                    resolved.config.sampling,
                    resolved.tokenizer.stop_ids,
                    jax.random.fold_in(key, step),
                    sharding=options.mesh,
                    implementation=options.implementation,
                    valid_vocab=resolved.valid_vocab,
                    indices=[dialogue.index for dialogue in batch],
                )
                for dialogue, generation in zip(batch, generations, strict=True):
                    dialogue.write(generation)
                progress.advance(len(batch))


def held_out_loss(
    resolved: setup.Setup,
    params: Params,
    found: Sequence[Sequence[samples.Sample]],
    options: Options = Options(),
) -> tuple[dict[int, float], dict[int, float]]:
    """Sums of loss and of weight by depth, over the edges of each conversation's prefix tree.

    found: the samples of each conversation. An edge that several turns train counts for the first.
    """
    params = generate.cast(resolved.model, params)
    execution = losses.Execution(
        options.mesh, options.implementation, valid_vocab=resolved.valid_vocab
    )
    loss: dict[int, float] = collections.defaultdict(float)
    weight: dict[int, float] = collections.defaultdict(float)
    trees = [_tree_and_depths(own) for own in found]
    for group, batch in _loss_batches(trees, options.mesh):
        batch = train.to_device(batch, options.mesh)
        log_probs = np.asarray(_log_probs(resolved.model, execution, params, batch), np.float64)
        for row, (layout, depths) in zip(log_probs, group, strict=False):
            for depth in np.unique(depths).tolist():
                weights = layout.edge_weights[depths == depth].astype(np.float64)
                loss[depth] -= float(weights @ row[: layout.num_edges][depths == depth])
                weight[depth] += float(weights.sum())
    return dict(sorted(loss.items())), dict(sorted(weight.items()))


_log_probs = jax.jit(
    lambda model, execution, params, batch: losses.edge_log_probs(model, params, batch, execution),
    static_argnums=(0, 1),
)


def _tree_and_depths(own: Sequence[samples.Sample]) -> tuple[Layout, np.ndarray]:
    """The prefix tree of a conversation and the depth of each of its edges."""
    ((layout,), report) = layouts.layouts_of(own, "tree")
    depths = np.zeros(layout.length, np.int32)
    for path, index in reversed(list(zip(layout.paths, report.members[0], strict=True))):
        sample = own[index]
        thread = sample.conversation.threads()[sample.thread]
        depths[path[sample.prompt_length :]] = depths_of(thread)[sample.message]
    return layout, depths[layout.edge_children]


def _loss_batches(
    trees: Sequence[tuple[Layout, np.ndarray]], mesh: sharding.Sharding | None
) -> Iterator[tuple[list[tuple[Layout, np.ndarray]], dict[str, np.ndarray]]]:
    """Batches of one tree a row: of few lengths, and of a number of rows that fits memory."""
    parts = 1 if mesh is None else mesh.size("batch")
    by_size = collections.defaultdict(list)
    for tree in trees:
        layout = tree[0]
        by_size[generate.bucket(max(layout.length, layout.num_edges))].append(tree)
    for size, members in sorted(by_size.items()):
        most = max(_LOSS_TOKENS // (size * parts), 1)
        rows = parts * min(most, 1 << (-(-len(members) // parts) - 1).bit_length())
        for start in range(0, len(members), rows):
            group = members[start : start + rows]
            packed = [packing.pack([layout], size)[0] for layout, _ in group]
            packed += [packing.empty_row(size)] * (rows - len(group))
            yield group, packing.stack(packed)
