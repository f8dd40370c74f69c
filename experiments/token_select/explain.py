# SPDX-License-Identifier: Apache-2.0
"""Shows what an answer was read from: the tokens that every step and layer kept, and their votes.

    python -m experiments.token_select.explain --config=configs/token_select.py:demo
        --checkpoint=DIR --prompt=TEXT --out=OUT [--drop=top:5 | --drop=120:140] [--step=1]

DIR is a workdir or a Hugging Face directory; --prompts=FILE takes a prompt a line, or JSON objects
with "prompt" or generated samples. Decoding is greedy. OUT receives kept.jsonl (a row per prompt,
step and layer: slots and votes), heat_N.png (steps by tokens) and report.html (the heat map, and
the text with what was picked marked). --drop leaves out, one at a time, the picked tokens with the
most votes or a span of slots while token number --step is predicted: effects.jsonl says how far its
logits move. The last line is {"report": path, "prompts": n, "rows": n, "texts": [...], "largest":
x}: of all logits, the largest change.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from lm import page, plots
from lm.config import SamplingConfig
from lm.errors import RunError, UserError
from lm.long_context import asking, highlights
from lm.long_context.explanation import Effects, Explanation
from lm.progress import Progress
from lm.prompting import Speaker
from lm.token_select import explain, speaking
from lm.token_select.config import SelectConfig, TokenSelectConfig

cli.define_config(data=False)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir or directory", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "the prompt")
PROMPTS = flags.DEFINE_string("prompts", None, "a file of prompts")
OUT = flags.DEFINE_string("out", None, "folder for rows, heat maps and report.html", required=True)
DROP = flags.DEFINE_string("drop", None, "top:N or START:END: what leaving it out does")
STEP = flags.DEFINE_integer("step", 1, "the token that --drop is about", lower_bound=0)
CHAT = flags.DEFINE_bool("chat", False, "through the chat template")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "at most", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "default: the checkpoint's"
)
cli.define_implementation()


def main() -> dict[str, Any]:
    if (PROMPT.value is None) == (PROMPTS.value is None):
        raise UserError("pass one of --prompt and --prompts")
    if DROP.value is not None:
        highlights.parse(DROP.value)  # refused before anything runs
        if STEP.value >= MAX_NEW_TOKENS.value:
            raise UserError(f"--step={STEP.value} is not below --max_new_tokens")
    select = cli.config(TokenSelectConfig).select
    path = pathlib.Path(CHECKPOINT.value)
    speaker = speaking.load(path, select, dtype=DTYPE.value).speaker
    records = [(PROMPT.value, "", ())]
    if PROMPTS.value is not None:
        records = asking.read(pathlib.Path(PROMPTS.value))
    prompts = [asking.encode(speaker, text, start, CHAT.value) for text, start, _ in records]
    folder = pathlib.Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    sections, rows, moved, texts = [], [], [], []
    with Progress("explain", len(prompts)) as progress:
        for number, prompt in enumerate(prompts):
            found, effects = _explained(speaker, prompt, select)
            png = plots.png(highlights.figure(found, speaker.tokenizer))
            (folder / f"heat_{number}.png").write_bytes(png)
            title = f"Prompt {number}"
            sections.append(highlights.section(title, found, speaker.tokenizer, png, effects))
            rows += [{"prompt": number, **row} for row in found.rows()]
            texts.append(speaker.tokenizer.decode(found.tokens))
            if effects is not None:
                made = highlights.effect_rows(found, speaker.tokenizer, *effects)
                moved += [{"prompt": number, **row} for row in made]
            progress.advance()
    _write(folder / "kept.jsonl", rows)
    if moved:
        _write(folder / "effects.jsonl", moved)
    html = page.render("What was read", f"{path.name} · {_settings(select)}", sections)
    (folder / "report.html").write_text(html, encoding="utf-8")
    result = {"report": str(folder / "report.html"), "prompts": len(prompts), "rows": len(rows)}
    result["texts"] = texts
    if moved:
        result["largest"] = max(row["largest_logit_change"] for row in moved)
    return result


def _explained(
    speaker: Speaker, prompt: np.ndarray, select: SelectConfig
) -> tuple[Explanation, tuple[int, np.ndarray, Effects] | None]:
    """One prompt, and what --drop asks about it."""
    settings = SamplingConfig(temperature=0.0, max_new_tokens=MAX_NEW_TOKENS.value)
    given = speaker.model, speaker.params, prompt, settings, select
    options = {"implementation": cli.implementation(), "valid_vocab": speaker.valid_vocab}
    key = jax.random.key(0)
    found = explain.explain(*given, speaker.stop_ids, key, **options)
    if not len(found.tokens):
        raise RunError("the model ends at once: there is no token to explain")
    if DROP.value is None:
        return found, None
    highlights.check_step(found.steps, STEP.value)
    spans = highlights.spans(DROP.value, found, STEP.value)
    effects = explain.effects(*given, key, spans, after=STEP.value, **options)
    return found, (STEP.value, spans, effects)


def _settings(select: SelectConfig) -> str:
    shown = ("n_init", "k", "n_local", "prefill", "positions", "rope")
    fields = dataclasses.asdict(select)
    return ", ".join(f"{name} {fields[name]}" for name in shown)


def _write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
