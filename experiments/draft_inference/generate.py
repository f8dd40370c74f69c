# SPDX-License-Identifier: Apache-2.0
"""Continues a prompt from what a draft lets the target keep of it.

    python -m experiments.draft_inference.generate --config=configs/draft_inference.py:demo
        --target=DIR --draft=DIR --prompt=TEXT [--method=speckv] [--budget=256] [--nodense]

DIR is a workdir or a Hugging Face directory; --config.draft.layers=N drafts with the target's own
first layers. Text appears as it is drawn. The last line is {"text": ..., "tokens": n,
"prompt_tokens": n, "stopped": x, "tokens_read": x, "tokens_kept": x, "dense": {"text": ...,
"agreement": x, "edit_distance": x}}: "dense", unless --nodense, is the same request with everything
kept.
"""

import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from experiments.long_context import flags as shared
from lm.config import SamplingConfig
from lm.draft_inference import evaluate, pipeline
from lm.draft_inference.config import DraftConfig
from lm.generate import Generation
from lm.long_context.options import Options
from lm.long_context.speaking import Selective

cli.define_config(data=False)
TARGET = flags.DEFINE_string("target", None, "workdir or directory", required=True)
DRAFT = flags.DEFINE_string("draft", "", "the same of the draft (default: draft.path)")
METHOD = flags.DEFINE_string("method", "speckv", "any of evaluate")
BUDGET = flags.DEFINE_integer("budget", None, "tokens kept (default: the config's)", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "at most", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "of both models; 0: greedy", lower_bound=0.0)
DENSE = flags.DEFINE_bool("dense", True, "also with everything kept, to compare")
shared.define_prompt()
shared.define_running()


def main() -> dict[str, Any]:
    text = shared.text()
    config, path = cli.config(DraftConfig), pathlib.Path(TARGET.value)
    pair = evaluate.opened(config, path, DRAFT.value, Options(dtype=cli.FLAGS.dtype))
    speaker, methods = pair.judge.speaker, pair.judge.methods
    budget = None if METHOD.value == evaluate.DENSE else BUDGET.value or methods.budget
    policy = methods.build(METHOD.value, budget)
    prompt = speaker.prompt(text, chat=cli.FLAGS.chat)
    sampling = SamplingConfig(temperature=TEMPERATURE.value, max_new_tokens=MAX_NEW_TOKENS.value)
    key, tokens, log_probs = jax.random.key(cli.FLAGS.seed), [], []
    stream = Selective(speaker, policy).stream(
        [prompt], sampling, key, implementation=cli.FLAGS.implementation
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
    result = {
        "text": speaker.tokenizer.decode(made.tokens, skip_special=True),
        "tokens": len(made.tokens),
        "prompt_tokens": len(prompt),
        "stopped": made.stopped,
        "tokens_read": summary["tokens_read"],
        "tokens_kept": summary.get("tokens_kept"),
    }
    if DENSE.value:
        (again,) = pipeline.rollback(
            speaker.model,
            speaker.prepared,
            [prompt],
            [made],
            sampling,
            speaker.stop_ids,
            key,
            implementation=cli.FLAGS.implementation,
            valid_vocab=speaker.valid_vocab,
        )
        result["dense"] = {
            "text": speaker.tokenizer.decode(again.dense.tokens, skip_special=True),
            "agreement": again.agreement,
            "edit_distance": again.edit_distance,
        }
    return result


if __name__ == "__main__":
    cli.run(main)
