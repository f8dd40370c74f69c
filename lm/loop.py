# SPDX-License-Identifier: Apache-2.0
"""The training loop: resume, step, log, check, save, stop.

What a run starts from, in this order: its own newest whole checkpoint, else `init_from`, else
random parameters. A rerun of the same command therefore continues, and a finished run only reports
its result again.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import numpy as np

from lm import checkpoint, hardware, train
from lm.config import Config
from lm.errors import RunError, UserError
from lm.progress import Progress, say
from lm.sharding import Sharding
from lm.workdir import Workdir

# (step, state, host batch): called every `train.verify_every` steps; raises to stop the run.
Hook = Callable[[int, train.TrainState, Mapping[str, np.ndarray]], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """What to train, assembled: the loop itself knows no paper."""

    config: Config
    requested: Config  # what config.json records
    objective: train.Objective
    initial: Callable[[], train.Params]  # the trained parameters at step 0; not called on resume
    abstract: train.Params  # their shapes
    frozen: train.Params
    data: grain.DatasetIterator  # yields host batches
    total_steps: int
    sharding: Sharding | None = None
    flops: Callable[[Mapping[str, np.ndarray]], float] | None = None  # model FLOPs of a host batch
    # from the sums of a step to what is logged; `loss_<train.weighting>` must be among it
    metrics: Callable[[Mapping[str, Any]], dict[str, float]] = train.mean_losses
    hook: Hook | None = None
    profile: str = ""  # directory for a JAX trace of a few steps


@dataclasses.dataclass(frozen=True)
class Result:
    """The end of a run."""

    step: int
    loss: float  # of the last step, under train.weighting
    state: train.TrainState
    seconds: float  # of training up to here in all processes, compilation excluded


def fit(job: Job, workdir: Workdir) -> Result:
    """Trains to `job.total_steps`, resuming from the workdir's checkpoints.

    Raises:
      UserError: a profile of more steps than are left.
      RunError: a non-finite loss, or a disk that cannot be written.
      SystemExit: status 143 after SIGTERM, with everything saved.
    """
    config = job.config.train
    optimizer = train.make_optimizer(job.config.optimizer, job.total_steps)
    store = checkpoint.Checkpoints(workdir.checkpoints, config.keep_checkpoints)
    try:
        state, loss, seconds = _start(job, optimizer, store)
        step = int(state.step)
        workdir.truncate_metrics(step)
        if step >= job.total_steps:  # whatever is asked now, the config is of what was trained
            say(f"{workdir.path}: already trained to step {step}")
            return Result(step, loss, state, seconds)
        if job.profile and job.total_steps - step < _TRACED:
            raise UserError(f"--profile traces steps 3 to {_TRACED}: fewer are left")
        workdir.record(job.requested)
        return _run(job, workdir, store, optimizer, state, seconds)
    finally:
        store.close()
        workdir.close()


def _start(job, optimizer, store) -> tuple[train.TrainState, float, float]:
    """The state, its loss, and the seconds that went into it."""
    seed = job.config.train.seed
    shapes = jax.eval_shape(
        lambda params: train.init_state(params, optimizer, seed, None), job.abstract
    )
    if job.sharding is not None:
        shapes = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            job.sharding.params(shapes),
        )
    restored = store.restore(shapes, job.data)
    if restored is not None:
        say(f"resuming from step {restored.step} of {store.directory}")
        return restored.state, restored.meta["loss"], restored.meta.get("seconds", 0.0)
    return train.init_state(job.initial(), optimizer, seed, job.sharding), math.nan, 0.0


def _run(job, workdir, store, optimizer, state, before) -> Result:
    config = job.config.train
    first, step_fn, began = int(state.step), None, time.monotonic()
    log = _Log(job, workdir)
    with _Stop() as stop, Progress("train", job.total_steps, first) as progress:
        for step in range(first + 1, job.total_steps + 1):
            try:
                host = next(job.data)
            except StopIteration:
                raise RunError(f"the data ended at step {step - 1} of {job.total_steps}") from None
            batch = train.to_device(host, job.sharding)
            if step_fn is None:
                step_fn = _compiled(job, optimizer, state, batch)
                began = time.monotonic()
                log.restart()
            with _Trace(job.profile, step - first):
                state, sums = step_fn(state, job.frozen, batch)
                if job.profile:
                    jax.block_until_ready(sums)
            # the check lags one step, so that the host prepares batches while the device works
            values = log.record(step, host, sums)
            progress.advance(values=values)
            if job.hook is not None and config.verify_every and step % config.verify_every == 0:
                job.hook(step, state, host)
            last = step == job.total_steps
            stopping = stop.requested(store, step)
            if last or stopping or step % config.checkpoint_every == 0:
                meta = {"loss": log.settle(), "seconds": before + time.monotonic() - began}
                store.save(step, state, job.data, meta)
            if stopping:
                store.wait()
                say(f"stopped at step {step}, saved; run the same command to go on")
                raise SystemExit(143)
        store.wait()
    return Result(job.total_steps, log.settle(), state, before + time.monotonic() - began)


def _compiled(job, optimizer, state, batch):
    """The step, compiled once and ahead of time: another shape later is an error, not a second
    program."""
    say("compiling the train step")
    step = train.make_step(job.objective, optimizer, job.config.train, job.config.model.dtype)
    return jax.jit(step, donate_argnums=0).lower(state, job.frozen, batch).compile()


class _Log:
    """Fetches the metrics of a step one step late, refuses non-finite losses, writes the rows."""

    def __init__(self, job: Job, workdir: Workdir):
        self._job, self._workdir = job, workdir
        self._pending: tuple[int, Any] | None = None
        self._loss = math.nan
        self._tokens, self._flops, self._steps, self._since = 0, 0.0, 0, time.monotonic()

    def restart(self) -> None:
        """Starts the clock of the first row of metrics: compilation is not training."""
        self._since = time.monotonic()

    def record(self, step: int, host: Mapping[str, np.ndarray], sums: Any) -> dict[str, float]:
        values = self._flush()
        self._tokens += int((host["until"] > 0).sum()) * jax.process_count()
        if self._job.flops is not None:
            self._flops += self._job.flops(host) * jax.process_count()
        self._pending = step, sums
        return values

    def settle(self) -> float:
        """The loss of the newest step, checked."""
        self._flush()
        return self._loss

    def _flush(self) -> dict[str, float]:
        if self._pending is None:
            return {}
        step, sums = self._pending
        self._pending = None
        sums = jax.device_get(sums)
        values = self._job.metrics(sums)
        self._loss = values[f"loss_{self._job.config.train.weighting}"]
        if not (math.isfinite(self._loss) and math.isfinite(float(sums["grad_norm"]))):
            raise RunError(
                f"non-finite loss or gradient at step {step} (loss {self._loss}); "
                "the last checkpoint before it is kept"
            )
        self._steps += 1
        every = self._job.config.train.log_every
        if step % every == 0 or step == 1 or step == self._job.total_steps:
            self._write(step, values | {"grad_norm": float(sums["grad_norm"])})
        return {"loss": self._loss}

    def _write(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        values["tokens_per_s"] = self._tokens / seconds
        values["step_ms"] = 1e3 * seconds / self._steps
        chip = hardware.chip()
        if chip is not None and self._flops:
            values["mfu"] = self._flops / seconds / (chip.flops * jax.device_count())
        self._tokens, self._flops, self._steps, self._since = 0, 0.0, 0, now
        self._workdir.scalars(step, values)


class _Stop:
    """SIGTERM asks the loop to save and leave; on several hosts all agree on the step first."""

    def __enter__(self):
        self._asked = False
        try:
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # not the main thread: a notebook or a test
            self._previous = None
        return self

    def _ask(self, *_):
        self._asked = True

    def requested(self, store: checkpoint.Checkpoints, step: int) -> bool:
        if jax.process_count() > 1:
            return store.reached_preemption(step)
        return self._asked

    def __exit__(self, *_):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


_TRACED = 5  # the last step of a profile


class _Trace:
    """A JAX profile of the third to the fifth step, after compilation has settled."""

    def __init__(self, directory: str, index: int):
        self._directory, self._index = directory, index

    def __enter__(self):
        if self._directory and self._index == 3:
            jax.profiler.start_trace(self._directory)

    def __exit__(self, *_):
        if self._directory and self._index == _TRACED:
            jax.profiler.stop_trace()
            say(f"trace of 3 steps in {self._directory}")
