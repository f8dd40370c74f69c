# SPDX-License-Identifier: Apache-2.0
"""A target and a draft that learn to retrieve, and every method at equal budgets on them: train,
evaluate and plot in one command, in calls of limited time.

    python -m experiments.draft_inference.study --config=configs/draft_inference.py:retrieval
        --draft_config=configs/draft_inference.py:retrieval_draft --workdir=DIR
        [--stage=train|evaluate|plot|all] [--minutes=9] [--pairs=1] [--budgets=192]
        [--lengths=1024,2048] [--samples=100] [--seeds=0,1,2] [--batch_size=128]

Methods take their turns on all tasks, lengths and seeds: SpecKV, SpecPC, SpecKV-PC, dense, SnapKV,
StreamingLLM, SpecPrefill, then others. Within --minutes every stage saves what it has and the
command ends with status 0; the same command goes on from there, and no row is measured twice.
DIR/runs can be thrown away once DIR/weights has the models; DIR/weights/target0 may be a copy of
what `token_select.study` left in its weights/model, which has the same preset. --pairs trains
several, over which intervals are taken. --plan only says what the trainings cost.

The last line is {"stage": name, "done": true | false, "training": {name: {"step": n, ...}} |
"comparisons": [...], "draft": [...], ... | "plots": [paths]}, of the last stage that ran; see
`evaluate` for its rows.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments import cli
from experiments.long_context import flags as shared
from lm.draft_inference import study
from lm.draft_inference.config import DraftConfig
from lm.long_context import study as studies
from lm.workdir import Workdir

cli.define_config(data=False, workdir=True)
config_flags.DEFINE_config_file("draft_config", help_string="FILE.py:PRESET of the draft")
flags.mark_flag_as_required("draft_config")
shared.define_study(study.STAGES, [])
PAIRS = flags.DEFINE_integer("pairs", 1, "that are trained, by seed", lower_bound=1)


def main() -> dict[str, Any]:
    target, draft = cli.config(DraftConfig), cli.config(DraftConfig, "draft_config")
    if cli.FLAGS.plan:
        return {"flops": studies.plan({"target": target, "draft": draft})}
    workdir, options = Workdir(cli.FLAGS.workdir), shared.studied(target.draft.seeds)
    stage, minutes = cli.FLAGS.stage, cli.FLAGS.minutes
    return study.run(target, draft, workdir, options, PAIRS.value, stage, minutes)


if __name__ == "__main__":
    cli.run(main)
