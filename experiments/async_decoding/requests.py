# SPDX-License-Identifier: Apache-2.0
r"""Writes the embedded requests with their answers as conversations, a JSON line each: to look at
them, or to train on them what takes a file, such as a CP head.

    python -m experiments.async_decoding.requests --config=configs/async_decoding.py:study \
        --count=4000 --out=FILE.jsonl [--split=train|validation]

Answers are programs, tags and all, by the annotators of the config. The last line is {"out": path,
"conversations": n}.
"""

import dataclasses

from absl import flags

from experiments import cli
from lm.async_decoding import runs
from lm.async_decoding.config import AsyncConfig
from lm.data import conversations
from lm.data.arithmetic import SPLITS
from lm.errors import UserError

cli.define_config()
OUT = flags.DEFINE_string("out", None, "JSONL file to write", required=True)
COUNT = flags.DEFINE_integer("count", 1000, "how many", lower_bound=1)
SPLIT = flags.DEFINE_enum("split", "train", list(SPLITS), "of those to train on, or held out")


def main() -> dict[str, object]:
    config = cli.config(AsyncConfig).run()
    if config.data.source != "requests":
        raise UserError(f"data.source={config.data.source}: only requests are made here")
    data = dataclasses.replace(config.data, limit=COUNT.value, eval_conversations=COUNT.value)
    made = runs.conversations(dataclasses.replace(config, data=data), SPLIT.value)
    return {"out": OUT.value, "conversations": conversations.write_conversations(OUT.value, made)}


if __name__ == "__main__":
    cli.run(main)
