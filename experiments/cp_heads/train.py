# SPDX-License-Identifier: Apache-2.0
r"""Trains a CP head: with its model, on a frozen trunk, or with adapters of the last layers.

    python -m experiments.cp_heads.train --config=configs/cp_heads.py:smoke --workdir=DIR
    python -m experiments.cp_heads.train --config=configs/cp_heads.py:smoke --workdir=DIR2 \
        --config.loss.mode=heads --config.init_from=DIR --config.head.rank=8

`init_from` is a workdir or a Hugging Face directory. Run the same command again to resume: it goes
on from the newest whole checkpoint in the workdir, bit for bit on CPU. The last line is
{"step": n, "loss": x, "params_sha256": "..."}.
"""

from absl import flags

from experiments import cli
from lm import jobs
from lm.cp_heads import training
from lm.cp_heads.config import CpConfig
from lm.workdir import Workdir

cli.define_config(workdir=True)
cli.define_distributed()
PROFILE = flags.DEFINE_bool(
    "profile", False, "write a JAX trace of steps 3 to 5 to WORKDIR/profile"
)


def main() -> dict[str, object]:
    cli.initialize_distributed()
    config = cli.config(CpConfig)
    return jobs.result(training.run(config, Workdir(cli.FLAGS.workdir), PROFILE.value))


if __name__ == "__main__":
    cli.run(main)
