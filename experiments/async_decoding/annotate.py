# SPDX-License-Identifier: Apache-2.0
"""Turns plain answers into answers that promise their parts, for SFT.

    python -m experiments.async_decoding.annotate --data=FILE.jsonl --out=ANNOTATED.jsonl

The rules find lists, sections and sentences that do not lean on each other. What they make is
validated and reads exactly as the answer did; refused answers stay plain, and every reason is
counted. Promised lengths are counted with --tokenizer here and again, by default, with the model's
own in training. The last line is {"out": path, "conversations": n, "answers": n, "annotated": n,
"sequential": n, "dropped": n, "promises": n, "refused": {reason: n}}.
"""

import dataclasses

from absl import flags

from experiments import cli
from lm.async_decoding import annotate
from lm.data import conversations
from lm.text import tokenizers

DATA = flags.DEFINE_string("data", None, "conversations (JSON, JSONL, .gz)", required=True)
OUT = flags.DEFINE_string("out", None, "JSONL file to write", required=True)
ANNOTATOR = flags.DEFINE_enum("annotator", "rules", sorted(annotate.ANNOTATORS), "who annotates")
TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", "bytes, a tokenizer.json or its directory")
GAIN = flags.DEFINE_float(
    "gain", 1.5, "promise a part that takes so many times the tokens of its promise"
)
ON_ERROR = flags.DEFINE_enum("on_error", "stop", list(conversations.ON_ERROR), "malformed records")


def main() -> dict[str, object]:
    reader = conversations.read_conversations(DATA.value, on_error=ON_ERROR.value)
    tokenizer = tokenizers.load_tokenizer(TOKENIZER.value)
    annotator = annotate.ANNOTATORS[ANNOTATOR.value](tokenizer, annotate.RuleConfig(GAIN.value))
    report = annotate.write(reader, annotator, OUT.value)
    return {"out": OUT.value, **dataclasses.asdict(report)}


if __name__ == "__main__":
    cli.run(main)
