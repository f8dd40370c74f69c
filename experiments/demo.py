# SPDX-License-Identifier: Apache-2.0
"""Runs the demos: each trains, evaluates and compares on embedded data, and ends with a table.

    python -m experiments.demo --only=single_pass --workdir=demo

| demo | what it shows | on 2 CPU cores |
|---|---|---|
| single_pass | all turns of a conversation trained in one pass, or one pass each | 3 minutes |
| cp_heads | heads that draft 4 tokens at once: tokens per trunk call by rank | 50 seconds |
| token_select | digits found from afar while a step reads a fifth of the context | 1 minute |
| draft_inference | the same when a tenth of the context is kept, by a draft's help | 1 minute |
| async_decoding | parts of an answer written at once: quality and decoder steps | 1 minute |

--only=all runs every one. Each works in WORKDIR/NAME; WORKDIR/report.html is about all of them.
The last line is {"report": path, "demos": {NAME: {"seconds": x, "rows": [...], ...}}}.
"""

import pathlib

from absl import flags

from experiments import cli
from experiments.async_decoding import demo as async_decoding
from experiments.cp_heads import demo as cp_heads
from experiments.draft_inference import demo as draft_inference
from experiments.single_pass import demo as single_pass
from experiments.token_select import demo as token_select
from lm import report
from lm.errors import UserError

DEMOS = {
    "single_pass": single_pass.run,
    "cp_heads": cp_heads.run,
    "token_select": token_select.run,
    "draft_inference": draft_inference.run,
    "async_decoding": async_decoding.run,
}

ONLY = flags.DEFINE_string("only", "all", f"all, or one of {', '.join(DEMOS)}")
WORKDIR = flags.DEFINE_string("workdir", "demo", "where the runs and report.html go")


def main() -> dict[str, object]:
    names = list(DEMOS) if ONLY.value == "all" else [ONLY.value]
    if names[0] not in DEMOS:
        raise UserError(f"--only={names[0]} is not all or one of {', '.join(DEMOS)}")
    root = pathlib.Path(WORKDIR.value)
    results = {name: DEMOS[name](root / name) for name in names}
    report.write([root / name for name in names], root)
    path = str(root / "report.html")
    print(f"\nsee {path}")
    return {"report": path, "demos": results}


if __name__ == "__main__":
    cli.run(main)
