# SPDX-License-Identifier: Apache-2.0
r"""Trains several modes on the same data for the same epochs from the same start: quality, time and
cost.

    python -m experiments.single_pass.compare --config=configs/single_pass.py:smoke \
        --data=FILE --modes=tree,n_pass

Every mode takes about the same number of optimiser steps over the same conversations (train.epochs
of them; train.steps is not used; a line says where steps differ by more than a tenth), then
generates held-out conversations turn by turn. Runs resume like any training. `gradient_noise` is
the batch-to-batch variance of the gradient over its squared mean.
The last line is {"rows": [{"mode": ..., "final_loss": held-out loss, "exact_match": x, "seconds":
x, "cost": x, ...}, ...]}.
"""

import pathlib
import tempfile

from absl import flags

from experiments import cli
from lm.progress import say
from lm.single_pass import compare
from lm.workdir import Workdir

cli.define_config()
MODES = flags.DEFINE_list("modes", ["tree", "n_pass"], "what to train")
WORKDIR = flags.DEFINE_string("workdir", None, "keep the runs here (default: a temporary one)")
PRICE = flags.DEFINE_float("chip_price", 0.0, "money per chip-hour", lower_bound=0.0)
NOISE = flags.DEFINE_bool("noise", True, "estimate gradient noise too")


def main() -> dict[str, object]:
    options = compare.Options(tuple(MODES.value), PRICE.value, NOISE.value)
    if WORKDIR.value:
        return {"rows": compare.compare(cli.config(), Workdir(WORKDIR.value), options)}
    with tempfile.TemporaryDirectory(prefix="skim-compare-") as folder:
        say("no --workdir: the trained models are not kept")
        return {"rows": compare.compare(cli.config(), Workdir(pathlib.Path(folder)), options)}


if __name__ == "__main__":
    cli.run(main)
