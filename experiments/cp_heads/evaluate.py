# SPDX-License-Identifier: Apache-2.0
"""How many tokens a trunk call would give with trained heads, from teacher forcing alone.

    python -m experiments.cp_heads.evaluate --config=configs/cp_heads.py:smoke --checkpoint=DIR

DIR is a workdir or a Hugging Face directory with a head; several, separated by commas, are measured
on the same texts where they share a trunk. Of the source that a run was trained on, only what it
held out is used; --data=FILE measures on other data (heads trained on code, tested on
conversations). Appends the rows to eval.jsonl of each workdir. The last line is {"rows": [{"rank":
r, "transition": t, "n": n, "expected_tokens_per_call": x, "stderr": x, "acceptance": [...],
"total_variation": [...], "nll": [...], ...}, ...], "best": name, "expected_tokens_per_call": x}.
Exit status 1 when a --require does not hold for the best row.
"""

import pathlib
from typing import Any

from absl import flags

from experiments import cli, gate
from lm.cp_heads import evaluate
from lm.cp_heads.config import CpConfig

NAMES = ("expected_tokens_per_call",)

cli.define_config()
REQUIRE = gate.define(NAMES)
CHECKPOINT = flags.DEFINE_list(
    "checkpoint", None, "workdirs or directories with heads", required=True
)
TEXTS = flags.DEFINE_enum(
    "texts", "sampled", evaluate.TEXTS, "continue prompts with the model, or take the data as it is"
)
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 64, "of each text, at most half of it")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "texts at once")
TEMPERATURES = flags.DEFINE_list("temperatures", [], "rows for each (default: the config's)")
SEED = flags.DEFINE_integer("seed", 0, "of the texts that are drawn")
cli.define_implementation()


def main() -> dict[str, Any]:
    requirements = gate.parse(REQUIRE.value, NAMES)
    options = evaluate.Options(
        texts=TEXTS.value,
        prompt_tokens=PROMPT_TOKENS.value,
        batch_size=BATCH_SIZE.value,
        temperatures=cli.numbers("temperatures", TEMPERATURES.value, float),
        seed=SEED.value,
        implementation=cli.implementation(),
    )
    result = evaluate.run(cli.config(CpConfig), list(map(pathlib.Path, CHECKPOINT.value)), options)
    failed = gate.failures(requirements, result)
    if failed:
        raise cli.CheckFailed(result, "; ".join(failed))
    return result


if __name__ == "__main__":
    cli.run(main)
