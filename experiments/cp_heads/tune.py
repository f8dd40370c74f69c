# SPDX-License-Identifier: Apache-2.0
r"""Chooses draft length, rank and transition by acceptance and latency on your data and device.

    python -m experiments.cp_heads.tune --config=configs/cp_heads.py:smoke --workdir=DIR \
        --checkpoint=HEAD[,HEAD...] [--data=FILE.jsonl]
    python -m experiments.cp_heads.tune --config=configs/cp_heads.py:smoke --workdir=DIR \
        --checkpoint=TRUNK --ranks=1,2,4,8 --transitions=identity,constant

The second form first trains heads on the trunk, for config.train.steps each, in DIR/heads; run it
again to go on. Every length up to config.head.predicted is a candidate. The choice is kept in
DIR/tuned.json with hashes of model, tokenizer and template. The last line is {"chosen": {"rank": r,
"transition": t, "n": n, "tokens_per_s": x, "speedup": x, "hashes": {...}, ...}, "rows": [...]}; an
empty "checkpoint" says that plain decoding was fastest.
"""

import pathlib
from typing import Any

from absl import flags

from experiments import cli
from lm.cp_heads import evaluate, tune
from lm.cp_heads.config import CpConfig
from lm.cp_heads.head import TRANSITIONS
from lm.workdir import Workdir

DEFAULTS = tune.Options()

cli.define_config(workdir=True)
CHECKPOINT = flags.DEFINE_list("checkpoint", None, "heads, or with --ranks a trunk", required=True)
RANKS = flags.DEFINE_list("ranks", [], "train heads of these ranks first")
TRANSITIONS_ = flags.DEFINE_list(
    "transitions", list(DEFAULTS.transitions), f"and of these transitions: {', '.join(TRANSITIONS)}"
)
TIMED = flags.DEFINE_integer("timed", DEFAULTS.timed, "candidates that are timed")
SEQUENCES = flags.DEFINE_integer("sequences", DEFAULTS.sequences, "batches that are timed")
BATCH = flags.DEFINE_integer("batch", DEFAULTS.batch, "prompts decoded at once while timing")
TEXTS = flags.DEFINE_enum("texts", "sampled", evaluate.TEXTS, "for acceptance, as in evaluate")
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 64, "of each text, at most half of it")
SEED = flags.DEFINE_integer("seed", 0, "of what is drawn")
cli.define_implementation()


def main() -> dict[str, Any]:
    options = tune.Options(
        ranks=cli.numbers("ranks", RANKS.value),
        transitions=tuple(TRANSITIONS_.value),
        timed=TIMED.value,
        sequences=SEQUENCES.value,
        batch=BATCH.value,
        texts=evaluate.Options(
            texts=TEXTS.value,
            prompt_tokens=PROMPT_TOKENS.value,
            seed=SEED.value,
            implementation=cli.implementation(),
        ),
    )
    workdir = Workdir(cli.FLAGS.workdir)
    return tune.run(
        cli.config(CpConfig), workdir, list(map(pathlib.Path, CHECKPOINT.value)), options
    )


if __name__ == "__main__":
    cli.run(main)
