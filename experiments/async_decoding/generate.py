# SPDX-License-Identifier: Apache-2.0
"""Answers prompts with threads: promised parts are written at once.

    python -m experiments.async_decoding.generate --checkpoint=WORKDIR --prompt="Count. ..."
    python -m experiments.async_decoding.generate --checkpoint=WORKDIR --prompts=FILE

--checkpoint is the workdir of a run, --hf_dir a Hugging Face directory. A model that was not
trained for threads answers sequentially. --prompts has a prompt per line: text, or JSON with the
key "prompt". The text of a single prompt is shown in reading order as it becomes final: main up to
the first part that is unfinished, then that part; on a terminal every thread has a colour. Tags in
a prompt are text.

The last line is {"text": x, "steps": n, "tokens": n, "speedup": x, "stopped": x, "warnings": {},
"seconds": x, "tokens_per_s": x}, with lists for --prompts (seconds, speed and speed-up are of all).
tokens came out, over all threads; speedup is what the same text takes token after token, over the
steps that it took; the time leaves out compilation and the prompt.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from experiments import cli
from lm import prompting
from lm.async_decoding import critical_path, decode, language, positions, speaking
from lm.async_decoding.answers import Answer
from lm.errors import UserError

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
flags.DEFINE_integer("max_new_tokens", 256, "per prompt, over all threads")
flags.DEFINE_integer("threads", 8, "parts that are written at a time, beside the main thread")
flags.DEFINE_enum(
    "positions", None, list(positions.DECODABLE), "of tokens (default: as the run was trained)"
)
flags.DEFINE_integer("seed", 0, "of the draws")
cli.define_implementation()
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "default: the checkpoint's")
FLAGS = flags.FLAGS
_COLOURS = (36, 33, 35, 32, 34, 31)  # of threads 1, 2, ...; main has the terminal's own


def main() -> dict[str, Any]:
    settings = decode.Settings(
        max_tokens=FLAGS.max_new_tokens,
        temperature=FLAGS.temperature,
        top_k=FLAGS.top_k,
        top_p=FLAGS.top_p,
        threads=FLAGS.threads,
        positions=FLAGS.positions,
    )
    single = FLAGS.prompt is not None
    if single == (FLAGS.prompts is not None):
        raise UserError("pass one of --prompt and --prompts")
    texts = [FLAGS.prompt] if single else prompting.read_prompts(pathlib.Path(FLAGS.prompts))
    if (FLAGS.hf_dir is None) == (FLAGS.checkpoint is None):
        raise UserError("pass one of --hf_dir and --checkpoint")
    if FLAGS.chat is False and (FLAGS.system is not None or FLAGS.template is not None):
        raise UserError("--system and --template need the chat template: not with --nochat")
    path = pathlib.Path(FLAGS.hf_dir if FLAGS.checkpoint is None else FLAGS.checkpoint)
    speaker, trained = speaking.load(
        path, FLAGS.checkpoint is None, template=FLAGS.template, dtype=FLAGS.dtype
    )
    rules = settings.rules(trained.positions, trained.form)
    rendered = (speaker.rendered(text, chat=FLAGS.chat, system=FLAGS.system) for text in texts)
    prompts = [language.encode_prompt(text, speaker.tokenizer) for text in rendered]
    options = {"implementation": cli.implementation()}
    if single:
        events = decode.speak_in_pieces(speaker, rules, settings, *prompts, FLAGS.seed, **options)
        found = [_show(events)]
    else:
        found = decode.speak(speaker, rules, settings, prompts, FLAGS.seed, **options)
        for answer in found:
            print(json.dumps({"text": answer.text}, ensure_ascii=False))
    return _result(speaker, found, single)


def _show(events: Iterator[decode.Event | Answer]) -> Answer:
    """Prints the events as they come; the answer is the last of them."""
    colours = sys.stdout.isatty()
    for event in events:
        if isinstance(event, Answer):
            print(flush=True)
            return event
        text = event.text
        if colours and event.thread:
            text = f"\033[{_COLOURS[(event.thread - 1) % len(_COLOURS)]}m{text}\033[0m"
        print(text, end="", flush=True)
    raise AssertionError("a stream ends with its answer")


def _result(speaker: prompting.Speaker, found: list[Answer], single: bool) -> dict[str, Any]:
    gains = (
        critical_path.speedup(speaking.sequential_steps(speaker, one), one.steps) for one in found
    )
    seconds = sum({one.seconds for one in found})  # those of a batch share theirs
    tokens = sum(one.decoded for one in found)
    each = {
        "text": [one.text for one in found],
        "steps": [one.steps for one in found],
        "tokens": [one.decoded for one in found],
        "stopped": [one.finished for one in found],
        "warnings": [dict(one.assembly.warnings) for one in found],
    }
    shown = {name: values[0] for name, values in each.items()} if single else each
    return shown | {
        "speedup": critical_path.geometric_mean(gains),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds if seconds else None,
    }


if __name__ == "__main__":
    cli.run(main)
