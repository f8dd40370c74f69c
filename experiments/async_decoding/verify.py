# SPDX-License-Identifier: Apache-2.0
"""Proves that layouts say what programs mean.

    python -m experiments.async_decoding.verify --config=configs/async_decoding.py:smoke \
        [--data=FILE.jsonl] [--programs=2000]

The config's own answers and random programs, under every scheme of positions, against a simulator
that runs the threads with sets; and the logits of the layout against those of each thread by
itself, a sequence of only what it remembers, in float32 at the highest matmul precision. Exit
status 1 for one wrong pair, label or position, or logits that differ by more than 1e-4. --corrupt
plants an error, which must be caught. The last line is {"programs": n, "visibility_errors": 0,
"label_errors": 0, "position_errors": 0, "thread_logit_error": x}.
"""

import dataclasses

import jax
from absl import flags

from experiments import cli
from lm import transformer
from lm.async_decoding import runs, training, verify
from lm.async_decoding.config import AsyncConfig
from lm.progress import Progress

cli.define_config()
PROGRAMS = flags.DEFINE_integer("programs", 2000, "random programs", lower_bound=0)
LOGITS = flags.DEFINE_integer(
    "logits", 8, "of the data and of the random programs, compare the logits of so many each"
)
IMPLEMENTATION = flags.DEFINE_string(
    "implementation", None, "of the ops (default: the first that serves)"
)
CORRUPT = flags.DEFINE_enum("corrupt", None, list(verify.CORRUPTIONS), "plant this error")


def main() -> dict[str, object]:
    config = cli.config(AsyncConfig).run()
    resolved = runs.resolve(config)
    tokenizer, template = resolved.setup.tokenizer, resolved.setup.template
    source = runs.conversations(config, "all")
    end = training.end_of_turn(template, tokenizer)
    examples = (
        example
        for index in range(len(source))
        for example in training.examples_of(source[index], template, tokenizer)
    )
    recount = config.threads.recount
    programs = [training.encoded(example, tokenizer, end, recount=recount) for example in examples]
    model = dataclasses.replace(resolved.setup.model, dtype="float32")
    params = transformer.init(model, jax.random.key(config.train.seed))
    total = len(programs) + PROGRAMS.value
    with jax.default_matmul_precision("highest"), Progress("verify", total) as progress:
        findings = verify.verify(
            model,
            params,
            programs,
            random_programs=PROGRAMS.value,
            logits=LOGITS.value,
            seed=config.data.seed,
            implementation=IMPLEMENTATION.value or config.train.implementation or None,
            corrupt=CORRUPT.value,
            advance=progress.advance,
        )
    result = dataclasses.asdict(findings)
    problems = findings.problems()
    if problems:
        raise cli.CheckFailed(result, "; ".join(problems))
    return result


if __name__ == "__main__":
    cli.run(main)
