# SPDX-License-Identifier: Apache-2.0
"""Any checkpoint as one that may answer in threads, and what an answer saved."""

import pathlib

from lm import prompting
from lm.async_decoding import runs, tables
from lm.async_decoding.answers import Answer
from lm.async_decoding.config import ThreadConfig
from lm.prompting import Speaker


def load(
    path: pathlib.Path, hf: bool, *, template: str | None = None, dtype: str | None = None
) -> tuple[Speaker, ThreadConfig]:
    """A model, and how its threads were trained. One that was not trained for threads answers
    sequentially.

    hf: a Hugging Face directory, not the workdir of a run.

    Raises UserError.
    """
    if hf:
        return prompting.load_hf(path, template=template, dtype=dtype), ThreadConfig()
    if not runs.has_threads(path):
        return prompting.load_workdir(path, template=template, dtype=dtype), ThreadConfig()
    run, params = runs.load(path)
    speaker = prompting.of_run(run.setup, params, template=template, dtype=dtype)
    return speaker, run.config.threads


def sequential_steps(speaker: Speaker, answer: Answer) -> int:
    """Steps that the same text takes token after token, its end included."""
    if not tables.has_tags(speaker.tokenizer):
        return answer.steps
    return len(speaker.tokenizer.encode(answer.text)) + 1
