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
first layers instead. --target=A,B --draft=A,B are trained pairs, over which intervals are taken.
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

from experiments import cli, gate
from lm.draft_inference import evaluate
from lm.draft_inference.config import DraftConfig
from lm.errors import UserError
from lm.long_context.options import Options
from lm.workdir import Workdir
from ops.dispatch import IMPLEMENTATIONS

NAMES = ("agreement", "accuracy")
DEFAULTS = Options()

cli.define_config(data=False)
REQUIRE = gate.define(NAMES)
TARGET = flags.DEFINE_list("target", [], "workdirs or Hugging Face directories")
DRAFT = flags.DEFINE_list("draft", [], "the same of drafts (default: the config's draft.path)")
HF_TARGET = flags.DEFINE_string("hf_target", None, "another name for --target")
HF_DRAFT = flags.DEFINE_string("hf_draft", None, "another name for --draft")
WORKDIR = flags.DEFINE_string("workdir", None, "where rows are kept (default: the target's run)")
METHODS = flags.DEFINE_list("methods", [], "default: the paper's, dense and the main baselines")
BUDGETS = flags.DEFINE_list("budgets", [], "tokens or 5% (default: the config's)")
TASKS = flags.DEFINE_list("tasks", [], "default: tasks.names of the config")
LENGTHS = flags.DEFINE_list("lengths", [], "tokens of a context (default: tasks.eval_lengths)")
SAMPLES = flags.DEFINE_integer("samples", 0, "of each task and length (default: eval_samples)")
SEEDS = flags.DEFINE_list("seeds", [], "of the samples, rows for each (default: draft.seeds)")
QUESTIONS = flags.DEFINE_list("questions", ["aware"], "aware, agnostic or both")
DATA = flags.DEFINE_string("data", "", "prompts in place of tasks: JSONL, or a line each")
TEMPLATES = flags.DEFINE_string(
    "templates", "", "JSON of LongBench's prompts by dataset, with {context} and {input}"
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", DEFAULTS.max_new_tokens, "with --data")
CAPACITY = flags.DEFINE_integer("capacity", None, "context in tokens, with --data", lower_bound=1)
CHAT = flags.DEFINE_bool(
    "chat", None, "through the chat template (default: a model of Hugging Face)"
)
TIMED = flags.DEFINE_bool("timed", None, "measure latency as well (default: with --data)")
BATCH_SIZE = flags.DEFINE_integer("batch_size", DEFAULTS.batch_size, "prompts at once")
TUNED = flags.DEFINE_string("tuned", "", "workdir of tune, or its tuned.json: its settings")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "default: the checkpoint's"
)
IMPLEMENTATION = flags.DEFINE_enum(
    "implementation", None, list(IMPLEMENTATIONS), "of the ops (default: the first that serves)"
)


def main() -> dict[str, Any]:
    requirements = gate.parse(REQUIRE.value, NAMES)
    targets = _paths("target", TARGET.value, HF_TARGET.value)
    if not targets:
        raise UserError("which target? give --target, a workdir or a Hugging Face directory")
    config = cli.config(DraftConfig)
    seeds = (0,) if DATA.value else config.draft.seeds
    options = Options(
        methods=tuple(METHODS.value),
        budgets=tuple(BUDGETS.value),
        tasks=tuple(TASKS.value),
        lengths=cli.numbers("lengths", LENGTHS.value),
        samples=SAMPLES.value,
        seeds=cli.numbers("seeds", SEEDS.value) or seeds,
        questions=tuple(QUESTIONS.value),
        data=DATA.value,
        templates=TEMPLATES.value,
        max_new_tokens=MAX_NEW_TOKENS.value,
        capacity=CAPACITY.value,
        chat=CHAT.value,
        timed=TIMED.value,
        batch_size=BATCH_SIZE.value,
        tuned=TUNED.value,
        dtype=DTYPE.value,
        implementation=IMPLEMENTATION.value,
    )
    workdir = None
    if WORKDIR.value is not None:
        workdir = Workdir(WORKDIR.value)
        workdir.create(config)
        if not (workdir.path / "config.json").exists():  # a run keeps its own
            workdir.record(config)
    drafts = _paths("draft", DRAFT.value, HF_DRAFT.value) or [""]
    result = evaluate.run(config, [pathlib.Path(x) for x in targets], drafts, options, workdir)
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
