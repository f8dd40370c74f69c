# SPDX-License-Identifier: Apache-2.0
r"""Proves that layouts say what programs mean, and that the decoder computes what was trained.

    python -m experiments.async_decoding.verify --config=configs/async_decoding.py:smoke \
        [--data=FILE.jsonl] [--programs=2000]

The config's own answers and random programs, under every scheme of positions, against a simulator
that runs the threads with sets; the logits of the layout against those of each thread by itself, a
sequence of only what it remembers, and against those of the decoder, whose steps are forced to
write the program; and the decoder against plain decoding where nothing is promised, and against
itself with other numbers of threads. All in float32 at the highest matmul precision.

Exit status 1 for one wrong pair, label, position or answer, or logits that differ by more than
1e-4. --corrupt plants an error, which must be caught. The last line is {"programs": n,
"visibility_errors": 0, "label_errors": 0, "position_errors": 0, "thread_logit_error": x,
"pool_logit_error": x, "sequential_mismatches": 0}.
"""

import dataclasses

import jax
from absl import flags

from experiments import cli
from lm import prompting, transformer
from lm.async_decoding import runs, training, verify, verify_pool
from lm.async_decoding.config import AsyncConfig
from lm.progress import Progress

cli.define_config()
PROGRAMS = flags.DEFINE_integer("programs", 2000, "random programs", lower_bound=0)
LOGITS = flags.DEFINE_integer(
    "logits",
    8,
    "of the data and of the random programs, compare the logits of so many each; half "
    "as many go through the decoder",
    lower_bound=0,
)
cli.define_implementation()
CORRUPT = flags.DEFINE_enum("corrupt", None, list(verify.CORRUPTIONS), "plant this error")


def main() -> dict[str, object]:
    config = cli.config(AsyncConfig).run()
    resolved = runs.resolve(config)
    source = runs.conversations(config, "all")
    programs = [program for _, program in training.decodable(resolved, source)]
    model = dataclasses.replace(resolved.setup.model, dtype="float32")
    params = transformer.init(model, jax.random.key(config.train.seed))
    implementation = cli.implementation()
    total = len(programs) + PROGRAMS.value + (verify_pool.PARTS if LOGITS.value else 0)
    with jax.default_matmul_precision("highest"), Progress("verify", total) as progress:
        findings = verify.verify(
            model,
            params,
            programs,
            random_programs=PROGRAMS.value,
            logits=LOGITS.value,
            seed=config.data.seed,
            implementation=implementation,
            corrupt=CORRUPT.value,
            advance=progress.advance,
        )
        if LOGITS.value:
            half = -(-LOGITS.value // 2)
            setup = dataclasses.replace(
                resolved.setup, config=dataclasses.replace(resolved.setup.config, model=model)
            )
            findings.pool_logit_error, findings.sequential_mismatches = verify_pool.check(
                prompting.of_run(setup, params),
                programs[:half],
                [program.prompt for program in programs[:half]],
                seed=config.data.seed,
                random_programs=half,
                implementation=implementation,
                advance=progress.advance,
            )
    result = dataclasses.asdict(findings)
    problems = findings.problems()
    if problems:
        raise cli.CheckFailed(result, "; ".join(problems))
    return result


if __name__ == "__main__":
    cli.run(main)
