# SPDX-License-Identifier: Apache-2.0
r"""Writes samples of a long-context task, a JSON line each, by RULER's and InfiniteBench's rules.

    python -m experiments.long_context.generate --task=niah_multikey_2 --length=4096 \
        --samples=20 --seed=1 --out=FILE.jsonl [--tokenizer=bytes|DIR] [--haystack=ESSAY.txt]

A line holds index, input, outputs, length and answer_prefix: the prompt is the input, then the
prefix, which a chat template puts after the assistant's header. `length` counts the tokenizer's
tokens, those to generate included. The last line of output is {"samples": n, "max_length": n}.
"""

import pathlib

from absl import flags

from experiments import cli
from lm.config import require_positive
from lm.errors import UserError
from lm.long_context import samples, tasks
from lm.text import tokenizers

TASK = flags.DEFINE_string("task", None, f"one of {', '.join(tasks.TASKS)}", required=True)
LENGTH = flags.DEFINE_integer("length", None, "tokens of a sample at most", required=True)
SAMPLES = flags.DEFINE_integer("samples", 20, "how many")
SEED = flags.DEFINE_integer("seed", 0, "same seed, same file")
OUT = flags.DEFINE_string("out", None, "the file to write", required=True)
TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", '"bytes" or a directory with tokenizer.json')
HAYSTACK = flags.DEFINE_string("haystack", None, "a text that needles are hidden in")


def main() -> dict[str, object]:
    task = tasks.find(TASK.value)
    require_positive("--samples", SAMPLES.value)
    require_positive("--length", LENGTH.value)
    essay = samples.read_essay(pathlib.Path(HAYSTACK.value)) if HAYSTACK.value else ()
    spec = "bytes" if TOKENIZER.value == "byte" else TOKENIZER.value
    tokenizer = tokenizers.load_tokenizer(spec)
    out = pathlib.Path(OUT.value)
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such directory")
    made = samples.stream(task, LENGTH.value, SAMPLES.value, SEED.value, tokenizer, essay)
    number, longest = samples.write(out, made)
    return {"samples": number, "max_length": longest}


if __name__ == "__main__":
    cli.run(main)
