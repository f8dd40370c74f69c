# SPDX-License-Identifier: Apache-2.0
"""Proves that the loss is the exact joint likelihood and that decoding with drafts changes nothing.

    python -m experiments.cp_heads.verify --config=configs/cp_heads.py:smoke [--checkpoint=DIR]

The likelihood, its gradients and the law of what is emitted are compared with enumerations, for a
small head of the config's kind (with --checkpoint: of the checkpoint's). Greedy output with drafts
is compared with plain generation on the config's model at random, or on --checkpoint (a workdir or
a Hugging Face directory with a head) with prompts from its data, in float32 at the highest matmul
precision unless --dtype says otherwise. Exit status 1 beyond 1e-5 nats of loss (relative above 1),
1e-4 of a gradient's largest entry, 1e-6 of a probability, or one wrong token; in bfloat16 and
float16 near ties can fall either way. The last line is {"loss_error": x, "grad_error": x,
"law_error": x, "greedy_mismatches": 0, "tokens_checked": n}.
"""

import dataclasses
import pathlib

import jax
from absl import flags

from experiments import cli
from lm import setup
from lm.cp_heads import checkpoints, head, prompts, verify
from lm.cp_heads.config import CpConfig

cli.define_config(data=False)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir or Hugging Face directory")
TOKENS = flags.DEFINE_integer("tokens", 10_000, "greedy tokens to compare", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "compute dtype of the model"
)
cli.define_implementation()


def main() -> dict[str, object]:
    config = cli.config(CpConfig)
    texts = []
    if CHECKPOINT.value is not None:
        loaded = checkpoints.load(pathlib.Path(CHECKPOINT.value), config)
        resolved, params = loaded.setup, loaded.params
        head_config, weights = loaded.head_config, loaded.head
        texts = prompts.held_out(resolved, 32)
    else:
        resolved = setup.resolve(config)
        head_config = config.head
        key = jax.random.key(config.train.seed)
        weights = jax.jit(head.init, static_argnums=(1, 2))(key, head_config, resolved.model)
        params = verify.random_params(resolved.model, config.train.seed)
    model = dataclasses.replace(resolved.model, dtype=DTYPE.value)
    precision = "highest" if DTYPE.value == "float32" else "default"
    with jax.default_matmul_precision(precision):
        findings = verify.verify(
            model,
            params,
            head_config,
            weights,
            prompts=texts,
            tokens=TOKENS.value,
            stop_ids=resolved.tokenizer.stop_ids,
            valid_vocab=resolved.valid_vocab,
            implementation=cli.implementation(),
            seed=config.train.seed,
        )
    result = dataclasses.asdict(findings)
    problems = findings.problems()
    if problems:
        raise cli.CheckFailed(result, "; ".join(problems))
    return result


if __name__ == "__main__":
    cli.run(main)
