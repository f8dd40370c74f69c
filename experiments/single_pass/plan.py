# SPDX-License-Identifier: Apache-2.0
"""What single-pass training would save on your own conversations, before anything is trained.

    python -m experiments.single_pass.plan --config=configs/single_pass.py:smoke --data=FILE.jsonl

Counts tokens, visible attention pairs and model FLOPs of whole conversations for each mode, packs
them as training would, and estimates memory. The last line is {"modes": {"tree": {"tokens": n,
"pairs": n, "flops": x, ...}, "paper": {...} or null, "n_pass": {...}, ...}, "predicted_speedup":
n_pass flops / tree flops, "packing": {"tree": fill, ...}}. A mode that refuses the data is null,
with the reason in "refused".
"""

import json

from absl import flags

from experiments import cli
from lm import setup
from lm.progress import Progress, say
from lm.single_pass import pipeline, plan
from lm.workdir import Workdir

cli.define_config()
MODES = flags.DEFINE_list("modes", list(plan.DEFAULT_MODES), "modes to count; n_pass always is")
CHIPS = flags.DEFINE_integer("chips", 1, "chips that share parameters and rows", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", None, "also write plan.json there, for the report")


def main() -> dict[str, object]:
    config = cli.config()
    resolved = setup.resolve(config)
    split = "train" if config.data.source == "arithmetic" else "all"
    source = setup.conversations(config.data, split)
    rows = max(1, config.train.batch_size // config.train.accumulate // CHIPS.value)
    with Progress("plan", len(source)) as progress:

        def groups():
            for index in range(len(source)):
                yield pipeline.samples_of(resolved, source[index])
                progress.advance()

        result = plan.plan(
            groups(),
            resolved.model,
            ["tree", *MODES.value],
            config.data.seq_len,
            config.data.window,
            overlong=config.data.overlong,
            rows_per_chip=rows,
            shards=CHIPS.value,
            remat=config.train.remat,
        )
    for line in plan.lines(result):
        print(line)
    result |= plan.summary(result)
    if WORKDIR.value:
        workdir = Workdir(WORKDIR.value)
        workdir.create(config)
        workdir.write("plan.json", json.dumps(result, indent=2) + "\n")
        say(f"wrote {workdir.path}/plan.json")
    return result


if __name__ == "__main__":
    cli.run(main)
