# SPDX-License-Identifier: Apache-2.0
r"""Trains a model on multi-turn reasoning conversations, every turn in one forward pass.

    python -m experiments.single_pass.train --config=configs/single_pass.py:smoke \
        --workdir=DIR [--data=FILE.jsonl]

Run the same command again to resume: it goes on from the newest whole checkpoint in the workdir,
bit for bit on CPU. The last line is {"step": n, "loss": x, "params_sha256": "..."}.
"""

from absl import flags

from experiments import cli
from lm import jobs
from lm.single_pass import training
from lm.workdir import Workdir

cli.define_config(workdir=True)
cli.define_distributed()
PROFILE = flags.DEFINE_bool(
    "profile", False, "write a JAX trace of steps 3 to 5 to WORKDIR/profile"
)


def main() -> dict[str, object]:
    cli.initialize_distributed()
    return jobs.result(training.run(cli.config(), Workdir(cli.FLAGS.workdir), PROFILE.value))


if __name__ == "__main__":
    cli.run(main)
