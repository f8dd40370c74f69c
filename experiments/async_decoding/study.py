# SPDX-License-Identifier: Apache-2.0
r"""The whole recipe of async decoding: SFT, preference optimisation over lambda, the baselines and
the schemes of positions, each model measured at once, in calls of limited time.

    python -m experiments.async_decoding.study --config=configs/async_decoding.py:study \
        --workdir=DIR [--stage=sft|preference|forms|lambdas|schemes|plot|all] [--minutes=9] \
        [--lambdas=2,8,1,4,inf] [--timed=64]

sft: a base that writes answers in a row, unless the config has an init_from or other data than
requests; from it the sequential baseline, then threads under the positions `predicted` and
`fork_join_max`;
preference: rounds at the first two lambdas, from `predicted`; forms: the same scheme, sot and apar
on the best annotations; lambdas: the other lambdas; schemes: fork_join_sum, and oracle, which
cannot be decoded and is compared by its held-out loss; plot: fronts of quality and speed-up,
threads over time.

Every model has its rows before the next one is trained; --config.data.eval_conversations questions
are asked in batches, and the first --timed of them again, one at a time, for their times.

Within --minutes every stage saves what it has and the command ends with status 0; the same command
goes on from there, and nothing that is finished is done again. DIR/weights, DIR/answers, DIR/timed
and DIR/eval.jsonl are all that it needs on another machine; what is lost with DIR/runs is a
training, or the rounds of a lambda, that had not ended. --plan only says what the trainings of SFT
cost.

The last line is {"stage": name, "done": true | false, "rows": [{"name": ..., "lambda": x | "inf" |
null, "quality": x, "speedup_critical_path": x, "speedup_wall": x, "realised": x, ...}],
"held_out_loss": {scheme: x}, "no_pairs": {name: reason}, "hypervolume": {speed: {family: x}},
"dominated": {speed: {name: true | false}}, "plots": [paths]}: `dominated` says whether some lambda
is as good in both, `no_pairs` names lambdas that found nothing to prefer.
"""

from typing import Any

from absl import flags

from experiments import cli
from lm.async_decoding import study
from lm.async_decoding.config import AsyncConfig
from lm.workdir import Workdir

cli.define_config(workdir=True)
STAGE = flags.DEFINE_enum("stage", "all", [*study.STAGES, "all"], "what to run")
MINUTES = flags.DEFINE_float("minutes", None, "stop after so long, saved; default: no limit")
LAMBDAS = flags.DEFINE_list(
    "lambdas", [f"{x:g}" for x in study.LAMBDAS], "weights of quality; the first two come first"
)
TIMED = flags.DEFINE_integer("timed", study.TIMED, "questions whose answers are timed at batch 1")
PLAN = flags.DEFINE_bool("plan", False, "only say what the trainings cost")


def main() -> dict[str, Any]:
    config = cli.config(AsyncConfig).run()
    if PLAN.value:
        return {"flops": study.plan(config)}
    lambdas = cli.numbers("lambdas", LAMBDAS.value, float)
    workdir = Workdir(cli.FLAGS.workdir)
    return study.run(config, workdir, lambdas, STAGE.value, MINUTES.value, TIMED.value)


if __name__ == "__main__":
    cli.run(main)
