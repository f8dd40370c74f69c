# SPDX-License-Identifier: Apache-2.0
"""Chooses k, n_local, pooling and the Selection Cache's theta for a target agreement with dense
decoding, on your data.

    python -m experiments.token_select.tune --config=configs/token_select.py:smoke --workdir=DIR
        --checkpoint=CHECKPOINT --target=0.98 [--data=PROMPTS.jsonl] [--ks=512,1024,2048]
        [--n_locals=256,512] [--pools=0,5] [--thetas=0.9,0.95]

Without --data samples of the config's tasks are used (--tasks, --lengths, --samples). The choice is
the setting that reads the least and reaches the target; it is kept in DIR/tuned.json with hashes of
model, tokenizer and template, and `evaluate --tuned=DIR` takes it up. The last line is {"chosen":
{"k": n, "n_local": n, "pool": n, "reuse": x, "agreement": x, "tokens_read": x, "hashes": {...},
...}, "agreement": x, "rows": [...]}. Exit status 1 when no setting reaches the target.
"""

import pathlib
from typing import Any

from absl import flags

from experiments import cli
from experiments.long_context import flags as shared
from lm.token_select import tune
from lm.token_select.config import TokenSelectConfig
from lm.workdir import Workdir

DEFAULTS = tune.Options()

cli.define_config(workdir=True, data=False)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir or directory", required=True)
TARGET = flags.DEFINE_float("target", DEFAULTS.target, "agreement with dense decoding")
KS = flags.DEFINE_list("ks", [], "default: shares of the context, from a 64th to a half")
N_LOCALS = flags.DEFINE_list("n_locals", [], "default: the config's and half of it")
POOLS = flags.DEFINE_list("pools", [str(x) for x in DEFAULTS.pools], "0: none")
THETAS = flags.DEFINE_list("thetas", [str(x) for x in DEFAULTS.thetas], "empty: no reuse")
shared.define_questions()


def main() -> dict[str, Any]:
    options = tune.Options(
        target=TARGET.value,
        ks=cli.numbers("ks", KS.value),
        n_locals=cli.numbers("n_locals", N_LOCALS.value),
        pools=cli.numbers("pools", POOLS.value),
        thetas=cli.numbers("thetas", THETAS.value, float),
        data=shared.options(),
    )
    workdir = Workdir(cli.FLAGS.workdir)
    path = pathlib.Path(CHECKPOINT.value)
    result = tune.run(cli.config(TokenSelectConfig), path, workdir, options)
    if result["chosen"] is None:
        best = max(row["agreement"] for row in result["rows"])
        raise cli.CheckFailed(result, f"no setting reaches {TARGET.value}; the best: {best:.4g}")
    return result


if __name__ == "__main__":
    cli.run(main)
