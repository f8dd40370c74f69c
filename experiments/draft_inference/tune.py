# SPDX-License-Identifier: Apache-2.0
"""Chooses the draft, the budget, the window and the pooling of SpecKV for a target agreement with
dense decoding, on your data.

    python -m experiments.draft_inference.tune --config=configs/draft_inference.py:smoke
        --workdir=DIR --target=CHECKPOINT --drafts=DRAFT[,DRAFT...] [--layers=2,4]
        [--target_agreement=0.98] [--data=PROMPTS.jsonl] [--budgets=64,128] [--windows=16,32]
        [--kernels=1,7]

--layers also tries the target's own first layers as drafts. Without --data samples of the config's
tasks are used (--tasks, --lengths, --samples). The choice is kept in DIR/tuned.json with hashes of
model, tokenizer and template, and `evaluate --tuned=DIR` takes it up. The last line is {"chosen":
{"path": ..., "layers": n, "budget": n, "window": n, "kernel": n, "agreement": x, "hashes": {...},
...}, "agreement": x, "rows": [...]}. Exit status 1 when no setting reaches the target.
"""

import pathlib
from typing import Any

from absl import flags

from experiments import cli
from experiments.long_context import flags as shared
from lm.draft_inference import tune
from lm.draft_inference.config import DraftConfig
from lm.workdir import Workdir

cli.define_config(workdir=True, data=False)
TARGET = flags.DEFINE_string("target", None, "workdir or directory", required=True)
AGREEMENT = flags.DEFINE_float("target_agreement", 0.98, "with dense decoding")
DRAFTS = flags.DEFINE_list("drafts", [], "workdirs or directories (default: draft.path)")
LAYERS = flags.DEFINE_list("layers", [], "also so many first layers of the target as drafts")
BUDGETS = flags.DEFINE_list("budgets", [], "default: shares of the context, a 64th to a half")
WINDOWS = flags.DEFINE_list("windows", [], "default: the config's")
KERNELS = flags.DEFINE_list("kernels", [], "of the pooling, odd (default: the config's)")
shared.define_questions()


def main() -> dict[str, Any]:
    options = tune.Options(
        target=AGREEMENT.value,
        drafts=tuple(DRAFTS.value),
        layers=cli.numbers("layers", LAYERS.value),
        budgets=cli.numbers("budgets", BUDGETS.value),
        windows=cli.numbers("windows", WINDOWS.value),
        kernels=cli.numbers("kernels", KERNELS.value),
        data=shared.options(),
    )
    workdir, path = Workdir(cli.FLAGS.workdir), pathlib.Path(TARGET.value)
    result = tune.run(cli.config(DraftConfig), path, workdir, options)
    if result["chosen"] is None:
        best = max(row["agreement"] for row in result["rows"])
        raise cli.CheckFailed(result, f"no setting reaches {AGREEMENT.value}; the best: {best:.4g}")
    return result


if __name__ == "__main__":
    cli.run(main)
