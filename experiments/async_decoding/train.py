# SPDX-License-Identifier: Apache-2.0
r"""Trains a model to promise parts of its answers, or one of the baselines.

    python -m experiments.async_decoding.train --config=configs/async_decoding.py:smoke \
        --workdir=DIR [--data=FILE.jsonl] [--config.stage=sft] [--config.threads.form=plain]
    python -m experiments.async_decoding.train --config=configs/async_decoding.py:smoke \
        --workdir=DIR --config.stage=preference --config.init_from=SFT_DIR \
        [--config.preference.quality_weight=2]

Stage sft: FILE holds conversations whose answers are programs, such as `annotate` writes; without
it the embedded requests are trained. --config.threads.form is async, plain (the sequential
baseline), sot or apar; --config.threads.positions picks the scheme of position ids.

Stage preference: rounds of sampling from the newest policy and of preferring the best sample to the
worst by speed-up + quality_weight * quality (the paper's lambda; inf: quality, then speed among
those as good). Each round works in WORKDIR/round_R; WORKDIR/eval.jsonl says what each came to.

Run the same command again to resume: it goes on from the newest whole checkpoint in the workdir,
bit for bit on CPU; samples that were drawn are not drawn again, finished rounds are skipped. The
last line is {"step": n, "loss": x, "params_sha256": "..."}.
"""

from absl import flags

from experiments import cli
from lm import jobs
from lm.async_decoding import preference, samplers, training
from lm.async_decoding.config import AsyncConfig
from lm.errors import UserError
from lm.workdir import Workdir

cli.define_config(workdir=True)
cli.define_distributed()
PROFILE = flags.DEFINE_bool(
    "profile", False, "write a JAX trace of steps 3 to 5 to WORKDIR/profile"
)


def main() -> dict[str, object]:
    cli.initialize_distributed()
    config = cli.config(AsyncConfig).run()
    workdir = Workdir(cli.FLAGS.workdir)
    if config.threads.stage == "sft":
        return jobs.result(training.run(config, workdir, PROFILE.value))
    if PROFILE.value:
        raise UserError("--profile is for the stage sft")
    own = config.preference
    make = samplers.decoder(config, own.threads, own.prompts_at_once * own.samples)
    return jobs.result(preference.run(config, workdir, make))


if __name__ == "__main__":
    cli.run(main)
