# SPDX-License-Identifier: Apache-2.0
"""Trains a model to promise parts of its answers, or the sequential baseline.

    python -m experiments.async_decoding.train --config=configs/async_decoding.py:smoke \
        --workdir=DIR [--data=FILE.jsonl] [--config.stage=sft] [--config.threads.form=plain]

FILE holds conversations whose answers are programs, such as `annotate` writes; without it the
embedded requests are trained. --config.threads.positions picks the scheme of position ids. Run the
same command again to resume: it goes on from the newest whole checkpoint in the workdir, bit for
bit on CPU. The last line is {"step": n, "loss": x, "params_sha256": "..."}.
"""

from absl import flags

from experiments import cli
from lm import jobs
from lm.async_decoding import training
from lm.async_decoding.config import AsyncConfig
from lm.workdir import Workdir

cli.define_config(workdir=True)
cli.define_distributed()
PROFILE = flags.DEFINE_bool(
    "profile", False, "write a JAX trace of steps 3 to 5 to WORKDIR/profile"
)


def main() -> dict[str, object]:
    cli.initialize_distributed()
    config = cli.config(AsyncConfig).run()
    return jobs.result(training.run(config, Workdir(cli.FLAGS.workdir), PROFILE.value))


if __name__ == "__main__":
    cli.run(main)
