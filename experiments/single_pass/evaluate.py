# SPDX-License-Identifier: Apache-2.0
"""Lets a trained model hold the held-out conversations itself, and scores its answers by turn.

    python -m experiments.single_pass.evaluate --config=configs/single_pass.py:smoke --workdir=DIR

The model, tokenizer and template are those of the newest checkpoint in the workdir; what is said,
how it is sampled and which thoughts stay in the history are the config's. Of the data that the run
was trained on, what it held out is used; of another file (--data=FILE), all. Appends a row per
depth to eval.jsonl and writes transcripts.jsonl. The last line is {"rows": [{"depth": n,
"exact_match": x, "loss": x, "n": n, ...}, ...], "exact_match": x, "loss": x, ...}. Exit status 1
when a --require does not hold.
"""

import json
from typing import Any

from absl import flags

from experiments import cli, gate
from lm.single_pass import evaluate
from lm.workdir import Workdir

NAMES = ("exact_match", "loss", "prefill_ms", "token_ms_p50", "token_ms_p95", "tokens_per_s")

cli.define_config(workdir=True)
REQUIRE = gate.define(NAMES)
cli.define_implementation()
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "conversations that are held at once")
SEED = flags.DEFINE_integer("seed", 0, "of the sampling, where the temperature is above 0")


def main() -> dict[str, Any]:
    requirements = gate.parse(REQUIRE.value, NAMES)
    workdir = Workdir(cli.FLAGS.workdir)
    result, transcripts = evaluate.run(
        cli.config(),
        workdir,
        evaluate.Options(
            implementation=cli.implementation(), batch_size=BATCH_SIZE.value, seed=SEED.value
        ),
    )
    lines = (json.dumps(transcript.to_dict(), ensure_ascii=False) for transcript in transcripts)
    workdir.write("transcripts.jsonl", "".join(line + "\n" for line in lines))
    failed = gate.failures(requirements, result)
    if failed:
        raise cli.CheckFailed(result, "; ".join(failed))
    return result


if __name__ == "__main__":
    cli.run(main)
