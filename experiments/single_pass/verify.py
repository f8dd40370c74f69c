# SPDX-License-Identifier: Apache-2.0
"""Proves on your own conversations that a single pass trains exactly what the N passes train.

    python -m experiments.single_pass.verify --config=configs/single_pass.py:smoke --data=FILE.jsonl

Takes every conversation whole (no seq_len, packing or sampling) in float32 at the highest matmul
precision, unless --dtype and --implementation choose the path that training will use. Exit status 1
when per-token losses, gradients, positions or visibility disagree: losses beyond 1e-5 nats
(relative above 1 nat), gradients beyond 1e-4 of the array's largest; 2e-2 for both in bfloat16 and
float16.
--corrupt plants an error, which must be caught. The last line is {"conversations": n, "turns": n,
"edges": n, "max_abs_loss": x, "max_rel_grad": x, "position_errors": n, "visibility_errors": n}.
"""

import dataclasses

import jax
from absl import flags

from experiments import cli
from lm import setup
from lm.progress import Progress
from lm.single_pass import verify

cli.define_config()
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "compute dtype of both sides"
)
cli.define_implementation("of the ops on the tree's side (default: the first that serves)")
CORRUPT = flags.DEFINE_enum("corrupt", None, list(verify.CORRUPTIONS), "plant this error")
MODE = flags.DEFINE_string("mode", None, "layout to check against N-pass (default: the config's)")


def main() -> dict[str, object]:
    config = cli.config()
    model = dataclasses.replace(config.model, dtype=DTYPE.value)
    resolved = setup.resolve(dataclasses.replace(config, model=model))
    source = setup.conversations(config.data, "all")
    precision = "highest" if DTYPE.value == "float32" else "default"
    with jax.default_matmul_precision(precision), Progress("verify", len(source)) as progress:
        params = setup.initial_params(resolved)

        def conversations():
            for index in range(len(source)):
                yield source[index]
                progress.advance()

        findings = verify.verify(
            resolved,
            params,
            conversations(),
            mode=MODE.value or config.data.mode,
            implementation=cli.implementation(),
            corrupt=CORRUPT.value,
        )
    result = dataclasses.asdict(findings)
    result.pop("max_rel_loss")
    problems = findings.problems(verify.TOLERANCES[DTYPE.value])
    if problems:
        raise cli.CheckFailed(result, "; ".join(problems))
    return result


if __name__ == "__main__":
    cli.run(main)
