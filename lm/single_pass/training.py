# SPDX-License-Identifier: Apache-2.0
"""Assembles a training job: conversations, rows, objective, checks."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging

from lm import jobs, loop, setup, sharding, train, transformer
from lm.config import Config
from lm.data import packing
from lm.errors import RunError
from lm.progress import say
from lm.single_pass import layouts, pipeline, verify
from lm.workdir import Workdir


def run(config: Config, workdir: Workdir, profile: bool = False) -> loop.Result:
    """Trains, or goes on training, in `workdir`. Raises UserError and RunError."""
    workdir.create(config)
    resolved = setup.resolve(config, workdir.path / "tokenizer")
    jobs.save_tokenizer(resolved, workdir)
    say(model_summary(resolved))
    prepared = job(resolved, profile=str(workdir.path / "profile") if profile else "")
    result = loop.fit(prepared, workdir)
    say(what_was_read(prepared))
    return result


def job(resolved: setup.Setup, total_steps: int | None = None, profile: str = "") -> loop.Job:
    """The job of a resolved config. total_steps: of its epochs, if the caller has counted them."""
    config = resolved.config
    model, data = config.model, config.data
    mesh = sharding.make(config.mesh, model)
    jobs.check_batch(config, mesh)
    if profile:
        jobs.check_profile(config)
    rows = pipeline.rows(
        resolved,
        setup.conversations(data),
        epochs=None if config.train.steps else config.train.epochs,
        process=jobs.processes(config),
    )
    local = config.train.batch_size // jax.process_count()
    dataset = packing.batches(rows, local, data.seq_len)
    execution = jobs.execution_of(resolved, mesh)
    return loop.Job(
        config=config,
        requested=resolved.requested,
        objective=train.edge_objective(model, execution, config.train.weighting),
        initial=lambda: setup.trained_params(resolved, mesh),
        abstract=setup.abstract_trained(model),
        frozen=setup.frozen_params(resolved, mesh),
        data=iter(dataset),
        total_steps=jobs.count_steps(config, dataset, total_steps),
        sharding=mesh,
        flops=functools.partial(jobs.batch_flops, model),
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


def _hook(resolved: setup.Setup) -> loop.Hook:
    """Checks one row of the batch, a different one each time, against its own N passes."""
    model = resolved.model
    tolerance = verify.TOLERANCES[model.dtype]
    execution = dataclasses.replace(jobs.execution_of(resolved, None), remat="none")

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


def model_summary(resolved: setup.Setup) -> str:
    """One line about what is trained."""
    model = resolved.model
    trained = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(setup.abstract_trained(model)))
    total = transformer.count_parameters(model)
    sizes = f"{total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained"
    return f"{sizes}, vocabulary {model.vocab_size}"
