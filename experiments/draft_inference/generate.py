# SPDX-License-Identifier: Apache-2.0
"""Continues a prompt from what a draft lets the target keep of it.

    python -m experiments.draft_inference.generate --config=configs/draft_inference.py:demo
        --target=DIR --draft=DIR --prompt=TEXT [--method=speckv] [--budget=256] [--nodense]
        [--speculate=4]

DIR is a workdir or a Hugging Face directory; --config.draft.layers=N drafts with the target's own
first layers, --heads=DIR with a CP head on it, several tokens in each of its passes. Text appears
as it is drawn. --speculate=N verifies the drafted tokens instead of throwing them away, and N more
in every further pass of the target (none with --heads, which propose once): the text is the same,
it comes at once, and what steps read is not counted.

The last line is {"text": ..., "tokens": n, "prompt_tokens": n, "stopped": x, "tokens_read": x,
"tokens_kept": x, "speculation": {"drafted": n, "accepted": n, "passes": n}, "dense": {"text": ...,
"agreement": x, "edit_distance": x}}: "dense", unless --nodense, is the same request with everything
kept.
"""

import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli, compositions
from experiments.long_context import flags as shared
from lm.config import SamplingConfig
from lm.draft_inference import evaluate, pipeline, speculate
from lm.draft_inference.config import DraftConfig
from lm.draft_inference.method import Drafted
from lm.draft_inference.methods import VOTED
from lm.errors import UserError
from lm.generate import Generation
from lm.long_context.options import Options
from lm.long_context.policy import Method
from lm.long_context.speaking import Selective
from lm.prompting import Speaker

cli.define_config(data=False)
TARGET = flags.DEFINE_string("target", None, "workdir or directory", required=True)
DRAFT = flags.DEFINE_string("draft", "", "the same of the draft (default: draft.path)")
HEADS = flags.DEFINE_string("heads", "", "instead: the same of a CP head on the target")
METHOD = flags.DEFINE_string("method", "speckv", "any of evaluate")
BUDGET = flags.DEFINE_integer("budget", None, "tokens kept (default: the config's)", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "at most", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "of both models; 0: greedy", lower_bound=0.0)
SPECULATE = flags.DEFINE_integer(
    "speculate", 0, "tokens drafted for every pass of the target; 0: a pass a token", lower_bound=0
)
DENSE = flags.DEFINE_bool("dense", True, "also with everything kept, to compare")
shared.define_prompt()
shared.define_running()


def main() -> dict[str, Any]:
    text = shared.text()
    config, path = cli.config(DraftConfig), pathlib.Path(TARGET.value)
    if HEADS.value and DRAFT.value:
        raise UserError("--draft and --heads both name a draft: pass one of them")
    source = compositions.proposals(HEADS.value) if HEADS.value else DRAFT.value
    pair = evaluate.opened(config, path, source, Options(dtype=cli.FLAGS.dtype))
    speaker, methods = pair.judge.speaker, pair.judge.methods
    budget = None if METHOD.value == evaluate.DENSE else BUDGET.value or methods.budget
    policy = methods.build(METHOD.value, budget)
    if HEADS.value and METHOD.value not in VOTED:
        raise UserError(f"--heads: {METHOD.value} takes no draft")
    prompt = speaker.prompt(text, chat=cli.FLAGS.chat)
    sampling = SamplingConfig(temperature=TEMPERATURE.value, max_new_tokens=MAX_NEW_TOKENS.value)
    key = jax.random.key(cli.FLAGS.seed)
    made, found = (_speculated if SPECULATE.value else _streamed)(
        speaker, policy, prompt, sampling, key
    )
    result = {
        "text": speaker.tokenizer.decode(made.tokens, skip_special=True),
        "tokens": len(made.tokens),
        "prompt_tokens": len(prompt),
        "stopped": made.stopped,
        **found,
    }
    if DENSE.value:
        result["dense"] = _dense(speaker, prompt, made, sampling, key)
    return result


def _speculated(
    speaker: Speaker, policy: Method, prompt: np.ndarray, sampling: SamplingConfig, key: jax.Array
) -> tuple[Generation, dict[str, Any]]:
    """Raises UserError for a method without a draft."""
    if not isinstance(policy, Drafted):
        raise UserError(f"--speculate verifies what a draft wrote; {METHOD.value} has none")
    (made,), verified = speculate.generations(
        speaker.model,
        speaker.params,
        [prompt],
        sampling,
        policy,
        speaker.stop_ids,
        key,
        block=SPECULATE.value,
        implementation=cli.implementation(),
        valid_vocab=speaker.valid_vocab,
    )
    print(speaker.tokenizer.decode(made.tokens, skip_special=True))
    about = {
        "drafted": int(verified.drafted[0]),
        "accepted": int(verified.accepted[0]),
        "passes": 1 + verified.steps,
    }
    return made, {"tokens_read": None, "tokens_kept": None, "speculation": about}


def _streamed(
    speaker: Speaker, policy: Method, prompt: np.ndarray, sampling: SamplingConfig, key: jax.Array
) -> tuple[Generation, dict[str, Any]]:
    tokens, log_probs = [], []
    stream = Selective(speaker, policy).stream(
        [prompt], sampling, key, implementation=cli.implementation()
    )
    shown, stopped, statistics = "", False, None
    for (piece,), found in stream:
        statistics = found
        tokens += piece.tokens.tolist()
        log_probs += piece.log_probs.tolist()
        stopped = piece.stopped
        whole = speaker.tokenizer.decode(np.array(tokens, np.int32), skip_special=True)
        if not whole.endswith("\ufffd"):  # a character may go on in the next piece
            print(whole[len(shown) :], end="", flush=True)
            shown = whole
    print()
    made = Generation(np.array(tokens, np.int32), np.array(log_probs, np.float32), stopped)
    summary = statistics.summary(policy)
    return made, {
        "tokens_read": summary["tokens_read"],
        "tokens_kept": summary.get("tokens_kept"),
        "speculation": None,
    }


def _dense(
    speaker: Speaker,
    prompt: np.ndarray,
    made: Generation,
    sampling: SamplingConfig,
    key: jax.Array,
) -> dict[str, Any]:
    (again,) = pipeline.rollback(
        speaker.model,
        speaker.params,
        [prompt],
        [made],
        sampling,
        speaker.stop_ids,
        key,
        implementation=cli.implementation(),
        valid_vocab=speaker.valid_vocab,
    )
    return {
        "text": speaker.tokenizer.decode(again.dense.tokens, skip_special=True),
        "agreement": again.agreement,
        "edit_distance": again.edit_distance,
    }


if __name__ == "__main__":
    cli.run(main)
