# SPDX-License-Identifier: Apache-2.0
r"""What rank and transitions buy on one target: trains a trunk, all heads on it, and compares them.

    python -m experiments.cp_heads.study --config=configs/cp_heads.py:python_100m --workdir=DIR \
        [--stage=trunk|heads|offline|decode|check|all] [--minutes=9]

Stages: trunk (the target, and a small model that drafts for it), heads (ranks, lengths and
transitions of config.study and a Hydra head of equal size, trained in one step), offline (expected
acceptance), decode (tokens/s beside plain decoding and the other drafters), check (greedy text
against plain decoding, token by token). Within --minutes every stage saves what it has and the
command ends with status 0; the same command goes on from there, and what is finished is not done
again. Rows, each with command, commit, device and date, go to eval.jsonl and benchmark.jsonl of
DIR, figures to DIR/plots; DIR/trunk, DIR/draft and DIR/heads can be thrown away afterwards.

--plan only says what the trainings cost. The last line is {"stage": name, "done": true | false,
"rows": n, "plots": [paths], "summary": {"acceptance": {"n4 t0": {"cp r1": x, ...}, ...}, "fastest":
{"n4 t0": {"method": name, "speedup": x, "over_rank1": x, "baselines": {...}}, ...},
"greedy_mismatches": n, "tokens_checked": n}}. Exit status 1 when a greedy token differs.
"""

from typing import Any

from absl import flags

from experiments import cli
from lm.cp_heads import study
from lm.cp_heads.config import CpConfig
from lm.workdir import Workdir

cli.define_config(workdir=True)
STAGE = flags.DEFINE_enum("stage", "all", [*study.STAGES, "all"], "what to run")
MINUTES = flags.DEFINE_float("minutes", None, "stop after so long, saved; default: no limit")
PLAN = flags.DEFINE_bool("plan", False, "only say what the trainings cost")


def main() -> dict[str, Any]:
    config = cli.config(CpConfig)
    if PLAN.value:
        return {"flops": study.plan(config)}
    result = study.run(config, Workdir(cli.FLAGS.workdir), STAGE.value, MINUTES.value)
    wrong = result["summary"].get("greedy_mismatches", 0)
    if wrong:
        raise cli.CheckFailed(result, f"{wrong} greedy tokens differ from plain decoding")
    return result


if __name__ == "__main__":
    cli.run(main)
