# SPDX-License-Identifier: Apache-2.0
"""Text from a prompt, reading selected tokens of it at every step, and reading all of them.

    python -m experiments.token_select.generate --config=configs/token_select.py:paper
        --hf_dir=DIR --prompt_file=BOOK.txt --config.select.k=1024

Runs any checkpoint: the workdir of a run (--checkpoint) or a Hugging Face directory (--hf_dir);
nothing is trained. --config says what is read, by the preset and --config.select.*; without it the
checkpoint's own config does, or the paper's setting. --capacity is the context in tokens, those to
generate included: a longer prompt, and a budget above it, are refused. The last line is {"text": x,
"tokens": n, "stopped": x, "prompt_tokens": n, "seconds": x, "tokens_per_s": x, "tokens_read": x,
..., "dense": {"text": x, "seconds": x, "tokens_per_s": x, "tokens_read": x, "agreement": x}}; times
leave out compilation, agreement is the share of tokens until the texts part, and --nodense leaves
out the comparison.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from experiments.long_context import flags as shared
from lm.config import SamplingConfig
from lm.errors import UserError
from lm.generate import Generation
from lm.long_context import quality
from lm.long_context.decode import Statistics
from lm.long_context.policy import Dense, Policy
from lm.token_select import speaking
from lm.token_select.config import TokenSelectConfig

cli.define_config(data=False, required=False)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of a run")
HF_DIR = flags.DEFINE_string("hf_dir", None, "Hugging Face directory")
CAPACITY = flags.DEFINE_integer("capacity", None, "context in tokens", lower_bound=1)
DENSE = flags.DEFINE_bool("dense", True, "also read everything, to compare")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token")
TOP_K = flags.DEFINE_integer("top_k", 0, "draw from so many tokens only; 0: all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the most likely tokens that have this mass")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "at most")
shared.define_prompt()
shared.define_running()


def main() -> dict[str, Any]:
    text = shared.text()
    if (CHECKPOINT.value is None) == (HF_DIR.value is None):
        raise UserError("pass one of --hf_dir and --checkpoint")
    path = pathlib.Path(HF_DIR.value if CHECKPOINT.value is None else CHECKPOINT.value)
    select = None if cli.FLAGS.config is None else cli.config(TokenSelectConfig).select
    loaded = speaking.load(path, select, dtype=cli.FLAGS.dtype)
    prompt = loaded.speaker.prompt(text, chat=cli.FLAGS.chat)
    (made, statistics), seconds = _timed(loaded, prompt)
    written = loaded.speaker.tokenizer.decode(made.tokens)
    print(written, flush=True)
    result = {
        "text": written,
        "tokens": len(made.tokens),
        "stopped": made.stopped,
        "prompt_tokens": len(prompt),
        "seconds": seconds,
        "tokens_per_s": len(made.tokens) / seconds,
        **statistics.summary(loaded.policy),
    }
    if not DENSE.value:
        return result
    everything: Policy = Dense(loaded.policy.chunk)
    whole = dataclasses.replace(loaded, policy=everything)
    (other, statistics), seconds = _timed(whole, prompt)
    result["dense"] = {
        "text": loaded.speaker.tokenizer.decode(other.tokens),
        "seconds": seconds,
        "tokens_per_s": len(other.tokens) / seconds,
        **statistics.summary(everything),
        "agreement": quality.agreement(made.tokens, other.tokens),
    }
    return result


def _timed(
    loaded: speaking.Selective, prompt: np.ndarray
) -> tuple[tuple[Generation, Statistics], float]:
    """What a policy gives, and the seconds of a run after the first."""
    sampling = SamplingConfig(TEMPERATURE.value, TOP_K.value, TOP_P.value, MAX_NEW_TOKENS.value)

    def whole():
        stream = loaded.stream(
            [prompt],
            sampling,
            jax.random.key(cli.FLAGS.seed),
            implementation=cli.implementation(),
            capacity=CAPACITY.value,
            chunk=sampling.max_new_tokens,
        )
        (((made,), statistics),) = stream
        return made, statistics

    whole()
    start = time.perf_counter()
    found = whole()
    return found, time.perf_counter() - start


if __name__ == "__main__":
    cli.run(main)
