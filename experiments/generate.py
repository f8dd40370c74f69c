# SPDX-License-Identifier: Apache-2.0
"""Runs any checkpoint on any prompt.

    python -m experiments.generate --hf_dir=DIR --prompt="How are you?"
    python -m experiments.generate --checkpoint=WORKDIR --prompts=FILE

--hf_dir is a Hugging Face directory, --checkpoint the workdir of a run. --method=cp_heads drafts
with the CP head of either; the law of the text is the same. --prompts has a prompt per line: text,
or JSON with the key "prompt". A prompt is the user's message to the chat template where there is
one (--nochat: plain text to continue). The text of a single prompt is shown as it comes. The last
line is {"text": x, "tokens": n, "stopped": x, "seconds": x, "tokens_per_s": x}, with lists for
--prompts; the time leaves out compilation.
"""

import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from experiments.methods import METHODS, Opened
from lm import generate, prompting
from lm.config import SamplingConfig
from lm.errors import UserError

flags.DEFINE_enum("method", "dense", list(METHODS), "how tokens are found")
flags.DEFINE_string("hf_dir", None, "Hugging Face directory: config.json and safetensors")
flags.DEFINE_string("checkpoint", None, "workdir of a run")
flags.DEFINE_string("prompt", None, "one prompt")
flags.DEFINE_string("prompts", None, "file with a prompt per line")
flags.DEFINE_bool("chat", None, "render through the chat template (default: if there is one)")
flags.DEFINE_string("template", None, "chat template to use instead of the model's own")
flags.DEFINE_string("system", None, "system message, with the chat template")
flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token")
flags.DEFINE_integer("top_k", 0, "draw from so many tokens only; 0: all")
flags.DEFINE_float("top_p", 1.0, "draw from the most likely tokens that have this mass")
flags.DEFINE_integer("max_new_tokens", 256, "per prompt")
flags.DEFINE_integer("seed", 0, "of the draws")
cli.define_implementation()
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "default: the checkpoint's")
FLAGS = flags.FLAGS


def main() -> dict[str, Any]:
    sampling = SamplingConfig(
        temperature=FLAGS.temperature,
        top_k=FLAGS.top_k,
        top_p=FLAGS.top_p,
        max_new_tokens=FLAGS.max_new_tokens,
    )
    texts = _texts()
    if (FLAGS.hf_dir is None) == (FLAGS.checkpoint is None):
        raise UserError("pass one of --hf_dir and --checkpoint")
    if FLAGS.chat is False and (FLAGS.system is not None or FLAGS.template is not None):
        raise UserError("--system and --template need the chat template: not with --nochat")
    path = pathlib.Path(FLAGS.hf_dir if FLAGS.checkpoint is None else FLAGS.checkpoint)
    opened = METHODS[FLAGS.method](path, FLAGS.checkpoint is None, FLAGS.template, FLAGS.dtype)
    speaker = opened.speaker
    prompts = [speaker.prompt(text, chat=FLAGS.chat, system=FLAGS.system) for text in texts]
    ids, seconds = _run(opened, prompts, sampling, show=FLAGS.prompt is not None)
    written = [speaker.tokenizer.decode(tokens) for tokens, _ in ids]
    stopped = [stop for _, stop in ids]
    count = sum(len(tokens) for tokens, _ in ids)
    single = FLAGS.prompt is not None
    if not single:
        for text in written:
            print(json.dumps({"text": text}, ensure_ascii=False))
    return {
        "text": written[0] if single else written,
        "tokens": count,
        "stopped": stopped[0] if single else stopped,
        "seconds": seconds,
        "tokens_per_s": count / seconds,
    }


def _texts() -> list[str]:
    if (FLAGS.prompt is None) == (FLAGS.prompts is None):
        raise UserError("pass one of --prompt and --prompts")
    if FLAGS.prompt is not None:
        return [FLAGS.prompt]
    return prompting.read_prompts(pathlib.Path(FLAGS.prompts))


def _run(
    opened: Opened,
    prompts: Sequence[np.ndarray],
    sampling: SamplingConfig,
    show: bool,
) -> tuple[list[tuple[np.ndarray, bool]], float]:
    """Per prompt its tokens and whether it stopped, and the seconds without compilation."""

    def pieces(chunk: int) -> Iterator[list[generate.Generation]]:
        return opened.stream(
            prompts,
            sampling,
            jax.random.key(FLAGS.seed),
            implementation=cli.implementation(),
            chunk=chunk,
        )

    next(pieces(1))  # compiles, at the price of one prefill
    decode = opened.speaker.tokenizer.decode
    start = time.perf_counter()
    tokens: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    shown = ""
    for piece in pieces(16 if show else sampling.max_new_tokens):
        for index, new in enumerate(piece):
            tokens[index] += new.tokens.tolist()
            stopped[index] |= new.stopped
        if show:
            shown = _show(decode(tokens[0]), shown, last=False)
    seconds = time.perf_counter() - start
    if show:
        _show(decode(tokens[0]), shown, last=True)
    return [(np.array(t, np.int32), s) for t, s in zip(tokens, stopped, strict=True)], seconds


def _show(text: str, shown: str, last: bool) -> str:
    """Prints what is new of a growing text; a character may need the tokens that follow."""
    stable = text if last else text.rstrip("\ufffd")
    if stable.startswith(shown):
        print(stable[len(shown) :], end="\n" if last else "", flush=True)
        return stable
    if last:
        print(flush=True)
    return shown


if __name__ == "__main__":
    cli.run(main)
