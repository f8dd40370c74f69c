# SPDX-License-Identifier: Apache-2.0
"""A model that learns to retrieve, and what is left of that when a step reads a part: train,
evaluate and plot in one command, in calls of limited time.

    python -m experiments.token_select.study --config=configs/token_select.py:retrieval
        --workdir=DIR [--stage=train|evaluate|plot|all] [--minutes=9] [--budgets=k=5%]
        [--lengths=2048] [--samples=100] [--batch_size=128]

Every setting ("read_packed": keys are rotated when they are read, at packed positions, as in the
paper; "write_true": when they are written, at true ones; "whole_prompt": the same, and steps alone
select, not the prompt's chunks) has rows, answers and figures in a folder of its own. Dense
attention, token select, StreamingLLM and SnapKV come first in all of them, then the others. Within
--minutes every stage saves what it has and the command ends with status 0; the same command goes on
from there, and no row is measured twice. DIR/runs can be thrown away once DIR/weights has the
model. --plan only says what the training costs.

The last line is {"stage": name, "done": true | false, "training": {"step": n, ...} | "summary":
{setting: {"summary": [...], "accuracy": x, "share_of_dense": x, ...}} | "plots": [paths]}, of the
last stage that ran.
"""

from typing import Any

from experiments import cli
from experiments.long_context import flags as shared
from lm.long_context import study as studies
from lm.token_select import study
from lm.token_select.config import TokenSelectConfig
from lm.workdir import Workdir

cli.define_config(data=False, workdir=True)
shared.define_study(study.STAGES, ["0"])


def main() -> dict[str, Any]:
    config = cli.config(TokenSelectConfig)
    if cli.FLAGS.plan:
        return {"flops": studies.plan({"model": config})}
    workdir, options = Workdir(cli.FLAGS.workdir), shared.studied()
    return study.run(config, workdir, options, cli.FLAGS.stage, cli.FLAGS.minutes)


if __name__ == "__main__":
    cli.run(main)
