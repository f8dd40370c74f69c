# SPDX-License-Identifier: Apache-2.0
"""What keeping a part of a prompt costs in quality: methods by budget, task and length, on tasks or
on your own prompts, and how good the draft is.

    python -m experiments.draft_inference.evaluate --config=configs/draft_inference.py:smoke
        --target=DIR --draft=DIR [--methods=speckv,dense,snapkv] [--budgets=5%,10%,256]
        [--tasks=passkey] [--lengths=4096] [--samples=50] [--seeds=0,1,2]
        [--questions=aware,agnostic]
    python -m experiments.draft_inference.evaluate --config=... --target=DIR --draft=DIR
        --data=PROMPTS.jsonl

DIR is a workdir or a Hugging Face directory; --config.draft.layers=N drafts with the target's own
first layers instead, and --heads=DIR with a CP head on it, for methods that need only the drafted
tokens. --target=A,B --draft=A,B are trained pairs, over which intervals are taken.
A budget is what is kept of a prompt, in tokens or as a share of the context. A line of --data has
a "prompt" and maybe "references", or is one of LongBench's ("context", "input", "answers",
"dataset"), which has a scorer of its own. "agnostic" questions come when a part of the prompt has
been dropped. Rows are kept in eval.jsonl of --workdir (by default the target's run) and not
measured again. The last line is {"rows": [{"method": ..., "budget": n, "task": ..., "length": n,
"accuracy": x, "ci95": [lo, hi], ...}, ...], "comparisons": [{"method": "speckv", "against": ...,
"budget": ..., "mean_difference": x, "ci95": [lo, hi], "verdict": ..., ...}, ...], "draft": [
{"task": ..., "length": n, "overlap": x, "rank_correlation": x, "agreement": x, ...}, ...], ...}.
Comparisons are over tasks where dense attention reaches 80%; "saturated" ones leave nothing to
differ in. Exit status 1 when a --require does not hold for the first method's means at the first
budget.
"""

import math
import pathlib
from typing import Any

from absl import flags

from experiments import cli, compositions, gate
from experiments.long_context import flags as shared
from lm.draft_inference import evaluate
from lm.draft_inference.config import DraftConfig
from lm.errors import UserError

NAMES = ("agreement", "accuracy")

cli.define_config(data=False)
REQUIRE = gate.define(NAMES)
TARGET = flags.DEFINE_list("target", [], "workdirs or Hugging Face directories")
DRAFT = flags.DEFINE_list("draft", [], "the same of drafts (default: the config's draft.path)")
HEADS = flags.DEFINE_list("heads", [], "instead: the same of CP heads on the targets")
HF_TARGET = flags.DEFINE_string("hf_target", None, "another name for --target")
HF_DRAFT = flags.DEFINE_string("hf_draft", None, "another name for --draft")
shared.define_comparison(
    [], "default: the paper's, dense and the main baselines", [], " (default: draft.seeds)"
)
QUESTIONS = flags.DEFINE_list("questions", ["aware"], "aware, agnostic or both")
TEMPLATES = flags.DEFINE_string(
    "templates", "", "JSON of LongBench's prompts by dataset, with {context} and {input}"
)


def main() -> dict[str, Any]:
    requirements = gate.parse(REQUIRE.value, NAMES)
    targets = _paths("target", TARGET.value, HF_TARGET.value)
    if not targets:
        raise UserError("which target? give --target, a workdir or a Hugging Face directory")
    config = cli.config(DraftConfig)
    options = shared.comparison(
        seeds=(0,) if cli.FLAGS["data"].value else config.draft.seeds,
        questions=tuple(QUESTIONS.value),
        templates=TEMPLATES.value,
    )
    drafts = _paths("draft", DRAFT.value, HF_DRAFT.value)
    if drafts and HEADS.value:
        raise UserError("--draft and --heads both name a draft: pass one of them")
    drafts = drafts or [compositions.proposals(path) for path in HEADS.value] or [""]
    paths = [pathlib.Path(path) for path in targets]
    result = evaluate.run(config, paths, drafts, options, shared.kept(config))
    known = {name: math.nan if result[name] is None else result[name] for name in NAMES}
    failed = gate.failures(requirements, known)
    if failed:
        raise cli.CheckFailed(result, "; ".join(failed))
    return result


def _paths(name: str, given: list[str], hf: str | None) -> list[str]:
    if given and hf is not None:
        raise UserError(f"pass one of --{name} and --hf_{name}")
    return given or ([] if hf is None else [hf])


if __name__ == "__main__":
    cli.run(main)
