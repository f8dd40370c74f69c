# SPDX-License-Identifier: Apache-2.0
"""Trains a model on long-context tasks, for token select to be tried on.

    python -m experiments.token_select.train --config=configs/token_select.py:smoke --workdir=DIR

Run the same command again to resume: it goes on from the newest whole checkpoint in the workdir,
bit for bit on CPU. The last line is {"step": n, "loss": x, "params_sha256": "..."}.
"""

from absl import flags

from experiments import cli
from lm import jobs
from lm.long_context import training
from lm.token_select.config import TokenSelectConfig
from lm.workdir import Workdir

cli.define_config(workdir=True, data=False)
cli.define_distributed()
PROFILE = flags.DEFINE_bool(
    "profile", False, "write a JAX trace of steps 3 to 5 to WORKDIR/profile"
)


def main() -> dict[str, object]:
    cli.initialize_distributed()
    config = cli.config(TokenSelectConfig)
    return jobs.result(training.run(config, Workdir(cli.FLAGS.workdir), PROFILE.value))


if __name__ == "__main__":
    cli.run(main)
