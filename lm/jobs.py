# SPDX-License-Identifier: Apache-2.0
"""What every training job is assembled with, whatever it trains."""

import pathlib
import shutil
from collections.abc import Mapping

import grain
import jax
import numpy as np

from lm import loop, setup, sharding, train
from lm.config import Config, ModelConfig
from lm.errors import UserError
from lm.flops import training_flops
from lm.losses import Execution
from lm.text.tokenizers import Tokenizer
from lm.workdir import Workdir


def save_tokenizer(resolved: setup.Setup, workdir: Workdir) -> None:
    """Keeps a tokenizer that was trained for this run: other data would give another one."""
    directory = workdir.path / "tokenizer"
    if resolved.config.data.tokenizer.startswith("bpe:") and not directory.is_dir():
        save_whole(resolved.tokenizer, directory)


def save_whole(tokenizer: Tokenizer, directory: pathlib.Path) -> None:
    """Saves a tokenizer so that its directory is there only once all of it is."""
    partial = directory.with_name("tokenizer.partial")  # a run may be killed here
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    partial.replace(directory)


def check_batch(config: Config, mesh: sharding.Sharding | None) -> None:
    """Raises UserError unless every microbatch divides over the mesh and the processes."""
    split = 1 if mesh is None else mesh.size("batch")
    if config.train.batch_size % (split * config.train.accumulate):
        raise UserError(
            f"train.batch_size={config.train.batch_size} does not divide over {split} batch shards "
            f"times train.accumulate={config.train.accumulate}"
        )


def execution_of(resolved: setup.Setup, mesh: sharding.Sharding | None) -> Execution:
    """How this config's training step runs."""
    config = resolved.config.train
    return Execution(mesh, config.implementation or None, config.remat, resolved.valid_vocab)


def batch_flops(model: ModelConfig, host: Mapping[str, np.ndarray]) -> float:
    """Model FLOPs of a training step over these rows, padding counted as the tokens that it
    costs."""
    until = host["until"].astype(np.int64)
    pairs = (until - np.arange(until.shape[1])).clip(0).sum()
    edges = (host["edge_targets"] >= 0).sum()
    return training_flops(model, until.size, int(edges), int(pairs))


def result(run: loop.Result) -> dict[str, object]:
    """The contract of the train command."""
    return {
        "step": run.step,
        "loss": run.loss,
        "params_sha256": train.params_sha256(run.state.params),
    }


def processes(config: Config) -> tuple[int, int]:
    """(index, count) of the hosts. Raises UserError for epochs on several: their data would end at
    different steps."""
    if not config.train.steps and jax.process_count() > 1:
        raise UserError("train.steps=0 (epochs) runs on one process; set train.steps on a pod")
    return jax.process_index(), jax.process_count()


def check_profile(config: Config) -> None:
    """Raises UserError when a run is too short for its trace."""
    if config.train.steps and config.train.steps < 5:
        raise UserError("--profile traces steps 3 to 5: train for 5 steps at least")


def count_steps(config: Config, dataset: grain.IterDataset, counted: int | None = None) -> int:
    """Steps of a run: as the config says, or the batches of its epochs (`counted`, or one pass over
    the data). Raises UserError when there is none."""
    steps = config.train.steps or counted or sum(1 for _ in dataset)
    if not steps:
        raise UserError("the data gives no row to train on")
    return steps
