# SPDX-License-Identifier: Apache-2.0
"""Proves that draft inference is dense decoding when it keeps everything, and what it says it is
when it does not.

    python -m experiments.draft_inference.verify --config=configs/draft_inference.py:smoke
        [--checkpoint=DIR | --hf_dir=DIR] [--config.draft.path=DRAFT]

Every method with a budget of the whole prompt (scores, evictions and compressions all run) is
compared with plain generation, token by token; SpecKV without drafted tokens with SnapKV; SpecPC
with its list procedure; the sparse prefill with its mask; a ragged batch with each prompt alone.
The model is the config's at random, or a checkpoint's; the draft is draft.path's, the target's own
first draft.layers layers, or one at random. Float32 at the highest matmul precision. Exit status 1
when something does not hold; --corrupt plants an error, which must be caught. The last line is
{"full_budget_mismatches": n, "snapkv_reduction_error": x, "specpc_geometry": 63,
"specpc_mismatches": n, "sparse_prefill_error": x, "batch_mismatches": n, "tokens": n}.
"""

import dataclasses
import pathlib
from typing import Any

import jax
from absl import flags

from experiments import cli
from lm import prompting, setup
from lm.draft_inference import draft, verify
from lm.draft_inference.config import DraftConfig
from lm.errors import UserError
from lm.long_context import exact

cli.define_config(data=False)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of a run")
HF_DIR = flags.DEFINE_string("hf_dir", None, "Hugging Face directory")
LENGTH = flags.DEFINE_integer("length", None, "tokens of the longest prompt", lower_bound=2)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 16, "generated tokens compared", lower_bound=1)
TOLERANCE = flags.DEFINE_float("tolerance", verify.TOLERANCE, "of errors", lower_bound=0.0)
CORRUPT = flags.DEFINE_enum("corrupt", None, list(verify.CORRUPTIONS), "plant this error")
cli.define_implementation()


def main() -> dict[str, Any]:
    config = cli.config(DraftConfig)
    model, params, valid_vocab, fingerprint = _target(config)
    settings, seed = config.draft, config.train.seed
    if settings.path:
        drafter = draft.load(settings.path, dtype="float32")
        drafter.check_tokenizer(fingerprint)
    elif settings.layers:
        drafter = draft.FirstLayers(settings.layers)
    else:
        drafter = verify.random_draft(model, valid_vocab, seed + 1)
    vocabulary = valid_vocab or model.vocab_size
    prompts = verify.random_prompts(settings, vocabulary, LENGTH.value, seed)
    with jax.default_matmul_precision("highest"):
        findings = verify.verify(
            model,
            params,
            settings,
            drafter,
            prompts,
            new_tokens=NEW_TOKENS.value,
            valid_vocab=valid_vocab,
            implementation=cli.implementation(),
            seed=seed,
            corrupt=CORRUPT.value,
        )
    result = dataclasses.asdict(findings)
    problems = findings.problems(TOLERANCE.value)
    if problems:
        raise cli.CheckFailed(result, "; ".join(problems))
    return result


def _target(config: DraftConfig):
    """(model, parameters, real tokens of the vocabulary, the tokenizer's fingerprint)"""
    if CHECKPOINT.value is not None and HF_DIR.value is not None:
        raise UserError("pass one of --hf_dir and --checkpoint")
    if CHECKPOINT.value is not None:
        speaker = prompting.load_workdir(pathlib.Path(CHECKPOINT.value), dtype="float32")
    elif HF_DIR.value is not None:
        speaker = prompting.load_hf(pathlib.Path(HF_DIR.value), dtype="float32")
    else:
        resolved = setup.resolve(config)
        model = dataclasses.replace(resolved.model, dtype="float32")
        params = exact.random_params(model, config.train.seed)
        return model, params, resolved.valid_vocab, resolved.tokenizer.fingerprint
    return speaker.model, speaker.params, speaker.valid_vocab, speaker.tokenizer.fingerprint


if __name__ == "__main__":
    cli.run(main)
