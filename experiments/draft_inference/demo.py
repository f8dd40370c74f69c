# SPDX-License-Identifier: Apache-2.0
"""The demo of draft inference: a target and a smaller draft learn to copy digits from afar, then
the target answers from a tenth of its context, chosen with the draft's help and without. SpecPC is
left to `evaluate`: a pair of this size answers nothing with it."""

import pathlib
import time
from typing import Any

from configs import draft_inference as presets
from lm import tables
from lm.config import freeze
from lm.draft_inference import evaluate, training
from lm.draft_inference.config import DraftConfig
from lm.long_context import figures
from lm.long_context.methods import DENSE
from lm.long_context.options import Options
from lm.progress import say
from lm.workdir import Workdir

METHODS = ("speckv", DENSE, "snapkv")
BUDGET = "10%"
TASK = "number_string"  # the harder of the two that are trained; each is programs of its own
_SAMPLES = 32
_COLUMNS = ("method", "task", "length", "budget", "accuracy", "agreement", "tokens_read")


def run(folder: pathlib.Path) -> dict[str, Any]:
    """Runs the whole demo in `folder` and prints its table; returns what the table was made from.

    A second run in the same folder goes on from what is there.

    Raises:
      RunError: training broke.
    """
    began = time.monotonic()
    target, draft = (
        freeze(presets.get_config(name).to_dict(), DraftConfig) for name in ("demo", "demo_draft")
    )
    say("1/2 train: a model that is asked for digits from somewhere in its context, and a smaller")
    training.run(target, draft, folder)
    say("2/2 evaluate: the same questions, all of the context kept and a tenth of it")
    workdir = Workdir(folder)
    workdir.create(target)
    workdir.record(target)
    options = Options(
        methods=METHODS,
        budgets=(BUDGET,),
        tasks=(TASK,),
        samples=_SAMPLES,
        batch_size=_SAMPLES,
    )
    runs = folder / training.TARGET, str(folder / training.DRAFT)
    result = evaluate.run(target, [runs[0]], [runs[1]], options, workdir)
    figures.save(figures.draw(result["rows"]), folder / "plots")
    print(tables.text(tables.table(result["rows"], columns=_COLUMNS)))
    for row in result["comparisons"]:
        print(sentence(row))
    return {
        "seconds": time.monotonic() - began,
        **{name: result[name] for name in ("rows", "comparisons", "draft")},
    }


def sentence(row: dict[str, Any]) -> str:
    """A comparison in words."""
    about = f"Accuracy of {row['method']} minus {row['against']}"
    if row["ci95"] is None:
        return f"{about}: no task that dense attention masters."
    low, high = (100 * x for x in row["ci95"])
    return (
        f"{about}: {100 * row['mean_difference']:+.1f} points "
        f"(95 % interval {low:+.1f} to {high:+.1f}): {row['verdict']}."
    )
