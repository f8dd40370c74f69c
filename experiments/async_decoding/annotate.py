# SPDX-License-Identifier: Apache-2.0
r"""Turns plain answers into answers that promise their parts, for SFT.

    python -m experiments.async_decoding.annotate --data=FILE.jsonl --out=ANNOTATED.jsonl
    python -m experiments.async_decoding.annotate --data=FILE.jsonl --out=ANNOTATED.jsonl \
        --annotator=endpoint --url=https://HOST/v1 --model=NAME --key_env=VARIABLE \
        --price_in=X --price_out=Y --max_cost=Z

FILE holds conversations (OpenAI or ShareGPT) or instructions (`instruction`, `input`, `output`).
The rules find lists, sections and sentences that do not lean on each other; an endpoint is told the
language and shown seven examples. What either makes is validated and reads exactly as the answer
did; refused answers stay plain, and every reason is counted. Promised lengths are counted with
--tokenizer here and again, by default, with the model's own in training.

Before an endpoint is asked anything, what it may cost is printed, and refused above --max_cost
(prices are per million tokens). Replies are kept in OUT.replies.jsonl and not asked for again. The
key comes from the environment variable that --key_env names.

The last line is {"out": path, "conversations": n, "answers": n, "annotated": n, "sequential": n,
"dropped": n, "promises": n, "refused": {reason: n}}.
"""

from absl import flags

from experiments import cli
from experiments.async_decoding import endpoint_flags
from lm.async_decoding import annotate, instructions, prompted
from lm.async_decoding.endpoint import Endpoint
from lm.data import conversations
from lm.text import tokenizers

DATA = flags.DEFINE_string("data", None, "conversations (JSON, JSONL, .gz)", required=True)
OUT = flags.DEFINE_string("out", None, "JSONL file to write", required=True)
ANNOTATOR = flags.DEFINE_enum(
    "annotator", "rules", sorted([*annotate.ANNOTATORS, "endpoint"]), "who annotates"
)
TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", "bytes, a tokenizer.json or its directory")
GAIN = flags.DEFINE_float(
    "gain", 1.5, "promise a part that takes so many times the tokens of its promise (rules)"
)
ON_ERROR = flags.DEFINE_enum("on_error", "stop", list(conversations.ON_ERROR), "malformed records")
endpoint_flags.define()


def main() -> dict[str, object]:
    reader = instructions.read(DATA.value, on_error=ON_ERROR.value)
    if ANNOTATOR.value == "endpoint":
        endpoint = Endpoint(endpoint_flags.config(), f"{OUT.value}.replies.jsonl")
        annotator = prompted.Prompted(endpoint)
        reader = list(reader)
        annotator.fetch(reader)
    else:
        endpoint_flags.refuse("--annotator=endpoint")
        tokenizer = tokenizers.load_tokenizer(TOKENIZER.value)
        config = annotate.RuleConfig(GAIN.value)
        annotator = annotate.ANNOTATORS[ANNOTATOR.value](tokenizer, config)
    report = annotate.write(reader, annotator, OUT.value)
    return {"out": OUT.value, **vars(report), "refused": dict(report.refused)}


if __name__ == "__main__":
    cli.run(main)
