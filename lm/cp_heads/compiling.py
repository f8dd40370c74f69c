# SPDX-License-Identifier: Apache-2.0
"""The training step of a CP config in shapes, to be compiled for hardware that is not here."""

from lm import aot, jobs, setup
from lm.cp_heads import futures, head, training
from lm.cp_heads.config import CpConfig
from lm.sharding import Sharding


def problem(resolved: setup.Setup, mesh: Sharding | None) -> aot.Problem:
    """What `training.job` would train. Its FLOPs are those of full rows that are one document each.

    Raises UserError as training does.
    """
    config: CpConfig = resolved.config
    training.check(config)
    if config.loss.mode == "trunk":
        return aot.edges(resolved, mesh)
    head.check(config.head, resolved.model)
    size, length = config.train.batch_size, config.data.seq_len
    rows = aot.abstract_rows(size, length)
    execution = jobs.execution_of(resolved, mesh)
    return aot.Problem(
        objective=training.objective(config.model, config.head, config.loss, execution),
        trained=training.abstract_trained(config),
        frozen=training.abstract_frozen(config),
        batch=rows | futures.abstract_futures(size, length, config.head.predicted),
        flops=training.step_flops(
            config, size * length, size * length, size * length * (length + 1) // 2
        ),
    )
