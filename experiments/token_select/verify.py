# SPDX-License-Identifier: Apache-2.0
"""Proves that token selection is dense attention when it selects everything, and nothing else when
it does not.

    python -m experiments.token_select.verify --config=configs/token_select.py:smoke
        [--checkpoint=DIR | --hf_dir=DIR]

Logits of texts with k large enough (scoring, picking and gathering all run), and of dense chunks,
are compared with one forward pass without a cache; a ragged batch with each sequence alone; and
what every implementation that serves here picks with what the reference picks. The model is the
config's at random, or a checkpoint's, with random tokens: the longest text is two and a half times
what a step reads (--length: so many tokens). Float32 at the highest matmul precision unless --dtype
says otherwise. Exit status 1 beyond 1e-4 of the largest logit (--tolerance), or below an overlap of
0.99. The last line is {"dense_error": x, "chunk_error": x, "ragged_error": x,
"selection_overlap": x, "overlaps": {implementation: x}, "shadow_overlap": x, "tokens": n,
"steps": n, "cut": n}.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from lm import prompting, setup
from lm.errors import UserError
from lm.long_context import exact
from lm.token_select import verify
from lm.token_select.config import TokenSelectConfig

cli.define_config(data=False)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of a run")
HF_DIR = flags.DEFINE_string("hf_dir", None, "Hugging Face directory")
LENGTH = flags.DEFINE_integer("length", None, "tokens of the longest text", lower_bound=2)
STEPS = flags.DEFINE_integer("steps", 32, "decode steps at the end of every text", lower_bound=1)
TOLERANCE = flags.DEFINE_float("tolerance", None, "of errors, in place of 1e-4", lower_bound=0.0)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "compute dtype of the model"
)
cli.define_implementation()


def main() -> dict[str, Any]:
    config = cli.config(TokenSelectConfig)
    model, params, valid_vocab = _model(config)
    texts = verify.random_texts(model, config.select, STEPS.value, valid_vocab, config.train.seed)
    if LENGTH.value is not None:
        if LENGTH.value <= STEPS.value:
            raise UserError(f"--length={LENGTH.value} leaves no prompt before {STEPS.value} steps")
        longest = np.resize(texts[0], LENGTH.value)
        texts = [longest, *(text for text in texts[1:] if len(text) <= LENGTH.value)]
    precision = "highest" if DTYPE.value == "float32" else "default"
    with jax.default_matmul_precision(precision):
        findings = verify.verify(
            model,
            params,
            config.select,
            texts=texts,
            steps=STEPS.value,
            implementation=cli.implementation(),
            seed=config.train.seed,
        )
    result = dataclasses.asdict(findings)
    problems = findings.problems(TOLERANCE.value)
    if problems:
        raise cli.CheckFailed(result, "; ".join(problems))
    return result


def _model(config: TokenSelectConfig):
    """(model, parameters, real tokens of the vocabulary)"""
    if CHECKPOINT.value is not None and HF_DIR.value is not None:
        raise UserError("pass one of --hf_dir and --checkpoint")
    if CHECKPOINT.value is not None:
        speaker = prompting.load_workdir(pathlib.Path(CHECKPOINT.value), dtype=DTYPE.value)
    elif HF_DIR.value is not None:
        speaker = prompting.load_hf(pathlib.Path(HF_DIR.value), dtype=DTYPE.value)
    else:
        resolved = setup.resolve(config)
        model = dataclasses.replace(resolved.model, dtype=DTYPE.value)
        return model, exact.random_params(model, config.train.seed), resolved.valid_vocab
    return speaker.model, speaker.params, speaker.valid_vocab


if __name__ == "__main__":
    cli.run(main)
