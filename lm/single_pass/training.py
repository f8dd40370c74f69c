# SPDX-License-Identifier: Apache-2.0
"""Assembles a training job: conversations, rows, objective, checks."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging

from lm import loop, setup, sharding, train, transformer
from lm.config import Config, ModelConfig
from lm.data import packing
from lm.errors import RunError, UserError
from lm.losses import Execution
from lm.progress import say
from lm.single_pass import layouts, pipeline, plan, verify
from lm.workdir import Workdir


def run(config: Config, workdir: Workdir, profile: bool = False) -> loop.Result:
    """Trains, or goes on training, in `workdir`. Raises UserError and RunError."""
    workdir.create(config)
    resolved = setup.resolve(config, workdir.path / "tokenizer")
    save_tokenizer(resolved, workdir)
    say(model_summary(resolved))
    prepared = job(resolved, profile=str(workdir.path / "profile") if profile else "")
    result = loop.fit(prepared, workdir)
    say(what_was_read(prepared))
    return result


def save_tokenizer(resolved: setup.Setup, workdir: Workdir) -> None:
    """Keeps a tokenizer that was trained for this run: other data would give another one."""
    directory = workdir.path / "tokenizer"
    if resolved.config.data.tokenizer.startswith("bpe:") and not directory.is_dir():
        resolved.tokenizer.save(directory)


def job(resolved: setup.Setup, total_steps: int | None = None, profile: str = "") -> loop.Job:
    """The job of a resolved config. total_steps: of its epochs, if the caller has counted them."""
    config = resolved.config
    model, data = config.model, config.data
    mesh = sharding.make(config.mesh, model)
    check_batch(config, mesh)
    if profile and config.train.steps and config.train.steps < 5:
        raise UserError("--profile traces steps 3 to 5: train for 5 steps at least")
    source = setup.conversations(data)
    endless = config.train.steps > 0
    process = (jax.process_index(), jax.process_count())
    if not endless and process[1] > 1:
        raise UserError("train.steps=0 (epochs) runs on one process; set train.steps on a pod")
    rows = pipeline.rows(
        resolved,
        source,
        epochs=None if endless else config.train.epochs,
        process=process,
    )
    local = config.train.batch_size // jax.process_count()
    dataset = packing.batches(rows, local, data.seq_len)
    steps = config.train.steps or total_steps or pipeline.count_batches(dataset)
    if not steps:
        raise UserError("the data gives no row to train on")
    execution = execution_of(resolved, mesh)
    return loop.Job(
        config=config,
        requested=resolved.requested,
        objective=train.edge_objective(model, execution, config.train.weighting),
        initial=lambda: setup.trained_params(resolved, mesh),
        abstract=setup.abstract_trained(model),
        frozen=setup.frozen_params(resolved, mesh),
        data=iter(dataset),
        total_steps=steps,
        sharding=mesh,
        flops=functools.partial(batch_flops, model),
        hook=_hook(resolved) if config.train.verify_every else None,
        profile=profile,
    )


def what_was_read(prepared: loop.Job) -> str:
    """How full the rows were, and every count of what did not fit: nothing is lost in silence."""
    totals = packing.statistics(prepared.data)
    lost = {name: totals.get(name, 0) for name in layouts.COUNTS if not name.startswith("trained")}
    lost.pop("samples", None)
    parts = [f"{count:,.0f} {name.replace('_', ' ')}" for name, count in lost.items() if count]
    return f"rows {totals['fill']:.1%} full; " + (", ".join(parts) or "nothing dropped or cut")


def batch_flops(model: ModelConfig, host: Mapping[str, np.ndarray]) -> float:
    """Model FLOPs of a training step over these rows, padding counted as the tokens that it
    costs."""
    until = host["until"].astype(np.int64)
    pairs = (until - np.arange(until.shape[1])).clip(0).sum()
    edges = (host["edge_targets"] >= 0).sum()
    return plan.training_flops(model, until.size, int(edges), int(pairs))


def execution_of(resolved: setup.Setup, mesh: sharding.Sharding | None) -> Execution:
    """How this config's training step runs."""
    config = resolved.config.train
    return Execution(mesh, config.implementation or None, config.remat, resolved.valid_vocab)


def check_batch(config: Config, mesh: sharding.Sharding | None) -> None:
    """Raises UserError unless every microbatch divides over the mesh and the processes."""
    split = 1 if mesh is None else mesh.size("batch")
    if config.train.batch_size % (split * config.train.accumulate):
        raise UserError(
            f"train.batch_size={config.train.batch_size} does not divide over {split} batch shards "
            f"times train.accumulate={config.train.accumulate}"
        )


def _hook(resolved: setup.Setup) -> loop.Hook:
    """Checks one row of the batch, a different one each time, against its own N passes."""
    model = resolved.model
    tolerance = verify.TOLERANCES[model.dtype]
    execution = dataclasses.replace(execution_of(resolved, None), remat="none")

    def check(step: int, state: train.TrainState, host: Mapping[str, np.ndarray]) -> None:
        if jax.process_count() > 1:
            logging.log_first_n(logging.WARNING, "verify_every checks single-process runs only", 1)
            return
        full = [i for i, row in enumerate(host["until"]) if row.any()]
        chosen = full[step % len(full)]
        row = {name: values[chosen] for name, values in host.items()}
        params = train.merge(state.params, setup.frozen_params(resolved, None))
        findings = verify.check_row(resolved, jax.device_get(params), row, execution)
        problems = findings.problems(tolerance)
        if problems:
            raise RunError(f"verification failed at step {step}: {'; '.join(problems)}")
        say(f"step {step}: row {chosen} equals its N passes ({findings.max_abs_loss:.2g} nats)")

    return check


def result(run: loop.Result) -> dict[str, object]:
    """The contract of the train command."""
    return {
        "step": run.step,
        "loss": run.loss,
        "params_sha256": train.params_sha256(run.state.params),
    }


def model_summary(resolved: setup.Setup) -> str:
    """One line about what is trained."""
    model = resolved.model
    trained = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(setup.abstract_trained(model)))
    total = transformer.count_parameters(model)
    sizes = f"{total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained"
    return f"{sizes}, vocabulary {model.vocab_size}"
