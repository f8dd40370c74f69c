# SPDX-License-Identifier: Apache-2.0
"""What reading less costs in quality: methods at equal budgets, on tasks or on your own prompts.

    python -m experiments.token_select.evaluate --config=configs/token_select.py:smoke
        --checkpoint=DIR [--methods=dense,token_select,streaming_llm] [--budgets=5%,k=5%,512]
        [--tasks=passkey] [--lengths=4096] [--samples=50] [--seeds=0,1]
    python -m experiments.token_select.evaluate --config=... --checkpoint=DIR --data=PROMPTS.jsonl

DIR is a workdir or a Hugging Face directory. A budget is what a step reads altogether
(select.n_init + k + n_local), in tokens or as a share of the context; "k=" counts k alone. A line
of --data has a "prompt" and maybe "references"; then latency is measured, too. Rows are kept in
eval.jsonl of the run (or of --workdir) and not measured again. The last line is {"rows": [{"task":
..., "length": n, "method": ..., "budget": n, "accuracy": x, "agreement": x, "ci95": [lo, hi], ...},
...], "summary": [{"budget": ..., "method": ..., "against": ..., "mean_difference": x, "ci95": [lo,
hi], "below": [...], "holds": x, ...}, ...], "agreement": x, ...}. Agreement is with dense greedy
decoding: the share of tokens until the texts part. "below" are the cells where the first method is
below the other by more than the 95% interval of their paired difference. With select.guard_every
rows have what the guard found. Exit status 1 when a
--require does not hold for the means of the first method at the first budget.
"""

import math
import pathlib
from typing import Any

from absl import flags

from experiments import cli, gate
from experiments.long_context import flags as shared
from lm.long_context import evaluate
from lm.token_select.config import TokenSelectConfig
from lm.token_select.methods import USUAL, Methods

NAMES = ("agreement", "edit_distance", "accuracy", "share_of_dense")

cli.define_config(data=False)
REQUIRE = gate.define(NAMES)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir or directory", required=True)
shared.define_comparison(USUAL, "the first against the others", ["0"])


def main() -> dict[str, Any]:
    requirements = gate.parse(REQUIRE.value, NAMES)
    options, config = shared.comparison(), cli.config(TokenSelectConfig)
    methods, path = Methods(config.select), pathlib.Path(CHECKPOINT.value)
    result = evaluate.run(config, methods, path, options, shared.kept(config))
    known = {name: math.nan if result[name] is None else result[name] for name in NAMES}
    failed = gate.failures(requirements, known)
    if failed:
        raise cli.CheckFailed(result, "; ".join(failed))
    return result


if __name__ == "__main__":
    cli.run(main)
