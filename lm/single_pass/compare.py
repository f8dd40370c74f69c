# SPDX-License-Identifier: Apache-2.0
"""The A/B that a team runs before it switches: several modes trained on the same data from the same
start.

All modes see the same conversations for the same epochs. The optimiser steps are made alike too: a
mode whose rows hold fewer conversations gets proportionally more rows per step, so that a step of
every mode trains about the same conversations and one learning rate suits all. Rows per step are
whole, so with few of them steps may differ, which a line says.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import jobs, loop, losses, setup, sharding, train
from lm.config import Config, require_positive
from lm.data import packing
from lm.errors import UserError
from lm.progress import say
from lm.single_pass import evaluate, layouts, pipeline, training
from lm.workdir import Workdir

_NOISE_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """What `compare` needs beside the config."""

    modes: tuple[str, ...] = ("tree", "n_pass")
    chip_price: float = 0.0  # money per chip-hour
    noise: bool = True  # also estimate gradient noise


def compare(config: Config, workdir: Workdir, options: Options) -> list[dict[str, Any]]:
    """One row per mode: quality, time, chip-hours, cost. Each mode trains in its own folder of
    `workdir`.

    Raises:
      UserError: fewer than two modes, an unknown one, or one that refuses the data.
    """
    modes = [str(layouts.parse_mode(mode)) for mode in options.modes]
    if len(set(modes)) < 2:
        raise UserError("--modes needs at least two different ones, such as tree,n_pass")
    require_positive("train.epochs", config.train.epochs)
    workdir.refuse_run()
    workdir.create(config)
    workdir.record(config)
    resolved = setup.resolve(config, workdir.path / "tokenizer")
    jobs.save_tokenizer(resolved, workdir)
    held_out = held_out_conversations(config)
    plans = _equal_steps(resolved, modes)
    rows = []
    for mode in modes:
        requested, steps = plans[mode]
        full = dataclasses.replace(requested, model=resolved.model)
        own = dataclasses.replace(resolved, config=full, requested=requested)
        folder = Workdir(workdir.path / mode.replace(":", "_"))
        row = _run(own, folder, steps, held_out, options)
        row = {"kind": "compare", "method": mode, **row}
        workdir.append("compare.jsonl", evaluate.without_nan(row))
        rows.append(row)
    return rows


def held_out_conversations(config: Config) -> Sequence[Any]:
    """The conversations for evaluation; training ones, with a line saying so, when none are held
    out."""
    try:
        return setup.conversations(config.data, "validation")
    except UserError:
        source = setup.conversations(config.data, "train")
        say("no conversation is held out (data.validation_fraction): evaluating on training data")
        return setup.First(source, min(len(source), config.data.eval_conversations))


def _equal_steps(resolved: setup.Setup, modes: Sequence[str]) -> dict[str, tuple[Config, int]]:
    """Per mode its config, with a batch size that makes steps equal, and its steps."""
    config = resolved.requested
    source = setup.conversations(config.data)
    counts = {}
    for mode in modes:
        rows = pipeline.rows(resolved, source, mode=mode, epochs=config.train.epochs)
        counts[mode] = sum(1 for _ in rows)
        if not counts[mode]:
            raise UserError(f"mode {mode}: the data gives no row")
    steps = math.ceil(counts[modes[0]] / config.train.batch_size)
    mesh = sharding.make(config.mesh, resolved.model)
    unit = config.train.accumulate * (1 if mesh is None else mesh.size("batch"))
    plans = {}
    for mode in modes:
        size = math.ceil(counts[mode] / steps / unit) * unit
        train_config = dataclasses.replace(config.train, steps=0, batch_size=size)
        data = dataclasses.replace(config.data, mode=mode)
        own = dataclasses.replace(config, train=train_config, data=data)
        plans[mode] = own, math.ceil(counts[mode] / size)
        say(f"{mode}: {counts[mode]} rows, {size} per step")
    taken = {mode: count for mode, (_, count) in plans.items()}
    if max(taken.values()) > 1.1 * min(taken.values()):
        found = ", ".join(f"{mode} {count}" for mode, count in taken.items())
        say(f"steps differ ({found}): a larger train.batch_size brings them together")
    return plans


def _run(
    own: setup.Setup, folder: Workdir, steps: int, held_out: Sequence[Any], options: Options
) -> dict[str, Any]:
    mode = own.config.data.mode
    folder.create(own.requested)
    jobs.save_tokenizer(own, folder)
    job = training.job(own, total_steps=steps)
    say(f"{mode}: {job.total_steps} steps of {own.config.train.batch_size} rows")
    result = loop.fit(job, folder)
    params = train.merge(result.state.params, job.frozen)
    asked = evaluate.Options(job.sharding, own.config.train.implementation or None)
    found = evaluate.evaluate(own, params, held_out, asked)
    for row in found.rows:
        row = {"kind": "evaluate", "method": mode, "step": result.step, **row}
        folder.append("eval.jsonl", evaluate.without_nan(row) | {"seed": own.config.train.seed})
    hours = result.seconds / 3600 * jax.device_count()
    row = {
        "mode": mode,
        "final_loss": found.loss,
        "exact_match": found.exact_match,
        "seconds": result.seconds,
        "cost": hours * options.chip_price,
        "chip_hours": hours,
        "train_loss": result.loss,
        "steps": result.step,
        "rows_per_step": own.config.train.batch_size,
        "n": found.n,
        "seed": own.config.train.seed,
    }
    if options.noise:
        row["gradient_noise"] = gradient_noise(own, job)
    return row


def gradient_noise(own: setup.Setup, job: loop.Job) -> float | None:
    """Batch-to-batch variance of the gradient over its squared mean, tr(cov) / |mean|^2.

    Turns of a conversation share a batch in `tree`, so its batches may be less independent than
    those of shuffled N-pass samples; this number says by how much. It is taken at the start, which
    all modes share. Unbiased in both parts; None for fewer than two full batches.
    """
    params = job.initial()
    config = own.config
    source = setup.conversations(config.data)
    dataset = packing.batches(
        pipeline.rows(own, source, mode=config.data.mode, epochs=1),
        config.train.batch_size,
        config.data.seq_len,
    )
    gradient = jax.jit(_mean_gradient(job, config.train.weighting))
    total = squares = None
    count = 0
    for host in itertools.islice(dataset, _NOISE_BATCHES):
        if not (np.asarray(host["until"])[-1] > 0).any():
            continue  # the last batch of an epoch, not full
        grads = gradient(params, job.frozen, train.to_device(host, job.sharding))
        norm = _squared_norm(grads)
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        squares = norm if squares is None else squares + norm
        count += 1
    if count < 2:
        return None
    mean_square = _squared_norm(jax.tree.map(lambda g: g / count, total))
    variance = (squares / count - mean_square) * count / (count - 1)
    return float(variance / jnp.maximum(mean_square - variance / count, 1e-30))


def _squared_norm(tree: train.Params) -> jax.Array:
    return sum(jnp.vdot(g, g) for g in jax.tree.leaves(tree))


def _mean_gradient(job: loop.Job, weighting: str) -> Any:
    def mean_loss(params, frozen, batch):
        compute = train.cast(params, job.config.model.dtype)
        key = jax.random.key(0)
        total, _ = job.objective(train.merge(compute, frozen), batch, key)
        return -total / jnp.sum(batch[losses.WEIGHTS[weighting]])

    return jax.grad(mean_loss)
