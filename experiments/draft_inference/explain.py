# SPDX-License-Identifier: Apache-2.0
"""Shows what was dropped of a prompt, by every layer and KV head, and what that changed.

    python -m experiments.draft_inference.explain --config=configs/draft_inference.py:demo
        --target=DIR --draft=DIR --prompt=TEXT --out=OUT [--method=speckv] [--budget=26]

DIR is a workdir or a Hugging Face directory; --prompts=FILE takes a prompt a line, or JSON objects
with "prompt" or generated samples. Decoding is greedy. OUT receives dropped.jsonl (a row per
prompt, layer and KV head: places and scores of what was kept and dropped), heat_N.png and
report.html, where what was dropped is marked in the text. Every request is run again densely. The
last line is {"report": path, "prompts": n, "rows": n, "texts": [...], "dense": [...], "agreement":
x, "kept": x}: means over prompts, `kept` tokens of a KV head.
"""

import json
import pathlib
from typing import Any

import numpy as np
from absl import flags

from experiments import cli
from lm import page, plots
from lm.draft_inference import evaluate, explain
from lm.draft_inference.config import DraftConfig
from lm.errors import UserError
from lm.long_context import asking
from lm.long_context.options import Options
from lm.progress import Progress

cli.define_config(data=False)
TARGET = flags.DEFINE_string("target", None, "workdir or directory", required=True)
DRAFT = flags.DEFINE_string("draft", "", "the same of the draft (default: draft.path)")
METHOD = flags.DEFINE_string("method", "speckv", "any of evaluate with a draft")
BUDGET = flags.DEFINE_integer("budget", None, "tokens kept (default: the config's)", lower_bound=1)
PROMPT = flags.DEFINE_string("prompt", None, "the prompt")
PROMPTS = flags.DEFINE_string("prompts", None, "a file of prompts")
OUT = flags.DEFINE_string("out", None, "folder for rows, heat maps and report.html", required=True)
CHAT = flags.DEFINE_bool("chat", False, "through the chat template")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "at most", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "default: the checkpoint's"
)
cli.define_implementation()


def main() -> dict[str, Any]:
    if (PROMPT.value is None) == (PROMPTS.value is None):
        raise UserError("pass one of --prompt and --prompts")
    config, path = cli.config(DraftConfig), pathlib.Path(TARGET.value)
    pair = evaluate.opened(config, path, DRAFT.value, Options(dtype=DTYPE.value))
    speaker, methods = pair.judge.speaker, pair.judge.methods
    method = methods.build(METHOD.value, BUDGET.value or methods.budget)
    method.check(speaker.model, None, None)
    records = [(PROMPT.value, "", ())]
    if PROMPTS.value is not None:
        records = asking.read(pathlib.Path(PROMPTS.value))
    prompts = [asking.encode(speaker, text, start, CHAT.value) for text, start, _ in records]
    folder = pathlib.Path(OUT.value)
    sections, rows, found = [], [], []
    with Progress("explain", len(prompts)) as progress:
        for number, prompt in enumerate(prompts):
            one = explain.explain(
                speaker, method, prompt, MAX_NEW_TOKENS.value, cli.implementation()
            )
            folder.mkdir(parents=True, exist_ok=True)
            png = plots.png(explain.figure(one))
            (folder / f"heat_{number}.png").write_bytes(png)
            sections.append(explain.section(f"Prompt {number}", one, speaker.tokenizer, png))
            rows += [{"prompt": number, **row} for row in one.rows()]
            found.append(one)
            progress.advance()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "dropped.jsonl").write_text(text, encoding="utf-8")
    html = page.render("What was dropped", f"{path.name} · {METHOD.value}", sections)
    (folder / "report.html").write_text(html, encoding="utf-8")
    return {
        "report": str(folder / "report.html"),
        "prompts": len(prompts),
        "rows": len(rows),
        "texts": [speaker.tokenizer.decode(one.tokens) for one in found],
        "dense": [speaker.tokenizer.decode(one.again.dense.tokens) for one in found],
        "agreement": float(np.mean([one.again.agreement for one in found])),
        "kept": float(np.mean([one.kept.sum(axis=2).mean() for one in found])),
    }


if __name__ == "__main__":
    cli.run(main)
