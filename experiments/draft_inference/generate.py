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
from lm.config import SamplingConfig
from lm.draft_inference import evaluate, pipeline
from lm.draft_inference.config import DraftConfig
from lm.errors import UserError
from lm.generate import Generation
from lm.long_context.options import Options
from lm.long_context.speaking import Selective
from ops.dispatch import IMPLEMENTATIONS

cli.define_config(data=False)
TARGET = flags.DEFINE_string("target", None, "workdir or directory", required=True)
DRAFT = flags.DEFINE_string("draft", "", "the same of the draft (default: draft.path)")
METHOD = flags.DEFINE_string("method", "speckv", "any of evaluate")
BUDGET = flags.DEFINE_integer("budget", None, "tokens kept (default: the config's)", lower_bound=1)
PROMPT = flags.DEFINE_string("prompt", None, "the prompt")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "a file that is the prompt")
CHAT = flags.DEFINE_bool("chat", None, "through the chat template (default: if there is one)")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "at most", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "of both models; 0: greedy", lower_bound=0.0)
SEED = flags.DEFINE_integer("seed", 0, "of the draws")
DENSE = flags.DEFINE_bool("dense", True, "also with everything kept, to compare")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "default: the checkpoint's"
)
IMPLEMENTATION = flags.DEFINE_enum(
    "implementation", None, list(IMPLEMENTATIONS), "of the ops (default: the first that serves)"
)


def main() -> dict[str, Any]:
    text = _text()
    config, path = cli.config(DraftConfig), pathlib.Path(TARGET.value)
    pair = evaluate.opened(config, path, DRAFT.value, Options(dtype=DTYPE.value))
    speaker, methods = pair.judge.speaker, pair.judge.methods
    budget = None if METHOD.value == evaluate.DENSE else BUDGET.value or methods.budget
    policy = methods.build(METHOD.value, budget)
    prompt = speaker.prompt(text, chat=CHAT.value)
    sampling = SamplingConfig(temperature=TEMPERATURE.value, max_new_tokens=MAX_NEW_TOKENS.value)
    key, tokens, log_probs = jax.random.key(SEED.value), [], []
    stream = Selective(speaker, policy).stream(
        [prompt], sampling, key, implementation=IMPLEMENTATION.value
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
            speaker.params,
            [prompt],
            [made],
            sampling,
            speaker.stop_ids,
            key,
            implementation=IMPLEMENTATION.value,
            valid_vocab=speaker.valid_vocab,
        )
        result["dense"] = {
            "text": speaker.tokenizer.decode(again.dense.tokens, skip_special=True),
            "agreement": again.agreement,
            "edit_distance": again.edit_distance,
        }
    return result


def _text() -> str:
    if (PROMPT.value is None) == (PROMPT_FILE.value is None):
        raise UserError("pass one of --prompt and --prompt_file")
    if PROMPT.value is not None:
        return PROMPT.value
    try:
        return pathlib.Path(PROMPT_FILE.value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{PROMPT_FILE.value}: {reason}") from None


if __name__ == "__main__":
    cli.run(main)
