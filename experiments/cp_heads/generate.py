# SPDX-License-Identifier: Apache-2.0
"""Text from a prompt, with a CP head and without: the same law, fewer trunk calls.

    python -m experiments.cp_heads.generate --checkpoint=DIR --prompt="def fold(f, items):"
    python -m experiments.cp_heads.generate --tuned=TUNED --prompt="def fold(f, items):"

DIR is the workdir of a run or a Hugging Face directory with a head; TUNED a workdir of
experiments.cp_heads.tune, whose tuned.json names the head (unless --checkpoint does) and how many
tokens it drafts; a choice that was made for another model, tokenizer or template says so. The
prompt is continued as it
is (--chat: it goes through the chat template first). --chains above 1 verifies a tree of drafts,
one for each of the most likely components. The last line is {"text": x, "tokens": n, "stopped": x,
"seconds": x, "tokens_per_s": x, "tokens_per_call": x, "acceptance": [...], "without": {"text": x,
"seconds": x, "tokens_per_s": x}, "identical": x}; times leave out compilation, and `identical` is
null when tokens are drawn, since then only the law is the same.
"""

import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from lm.config import SamplingConfig
from lm.cp_heads import speaking, tune
from lm.errors import UserError

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir or Hugging Face directory")
TUNED = flags.DEFINE_string("tuned", None, "workdir of tune, or its tuned.json")
PROMPT = flags.DEFINE_string("prompt", None, "the text to continue")
flags.mark_flag_as_required("prompt")
CHAT = flags.DEFINE_bool("chat", False, "render the prompt through the chat template")
CHAINS = flags.DEFINE_integer("chains", 1, "drafts of a trunk call", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token")
TOP_K = flags.DEFINE_integer("top_k", 0, "draw from so many tokens only; 0: all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the most likely tokens that have this mass")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "at most")
SEED = flags.DEFINE_integer("seed", 0, "of the draws")
cli.define_implementation()
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "default: the checkpoint's"
)


def main() -> dict[str, Any]:
    sampling = SamplingConfig(TEMPERATURE.value, TOP_K.value, TOP_P.value, MAX_NEW_TOKENS.value)
    loaded = _loaded()
    speaker = loaded.speaker
    prompts = [speaker.prompt(PROMPT.value, chat=CHAT.value)]
    key = jax.random.key(SEED.value)
    options = {"implementation": cli.implementation(), "chunk": sampling.max_new_tokens}

    def drafted():
        return loaded.stream(prompts, sampling, key, chains=CHAINS.value, **options)

    def plain():
        return speaker.stream(prompts, sampling, key, **options)

    ((with_head,), statistics), seconds = _timed(drafted)
    (without,), seconds_without = _timed(plain)
    found = statistics.summary()
    text = speaker.tokenizer.decode(with_head.tokens)
    print(text, flush=True)
    return {
        "text": text,
        "tokens": len(with_head.tokens),
        "stopped": with_head.stopped,
        "seconds": seconds,
        "tokens_per_s": len(with_head.tokens) / seconds,
        "tokens_per_call": found["tokens_per_call"],
        "acceptance": found["acceptance"],
        "without": {
            "text": speaker.tokenizer.decode(without.tokens),
            "seconds": seconds_without,
            "tokens_per_s": len(without.tokens) / seconds_without,
        },
        "identical": None
        if sampling.temperature
        else np.array_equal(with_head.tokens, without.tokens),
    }


def _loaded() -> speaking.Drafting:
    choice = tune.load(pathlib.Path(TUNED.value)) if TUNED.value else None
    if CHECKPOINT.value is not None:
        path = pathlib.Path(CHECKPOINT.value)
    elif choice is not None:
        path = tune.checkpoint_of(choice)
    else:
        raise UserError("which head? give --checkpoint or --tuned")
    loaded = speaking.load(path, dtype=DTYPE.value)
    return loaded if choice is None else speaking.as_chosen(loaded, choice)


def _timed(stream: Callable[[], Iterable[Any]]) -> tuple[Any, float]:
    """What the whole stream gives in its one piece, and the seconds of a run after the first."""
    list(stream())
    start = time.perf_counter()
    (piece,) = stream()
    return piece, time.perf_counter() - start


if __name__ == "__main__":
    cli.run(main)
