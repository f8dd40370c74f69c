# SPDX-License-Identifier: Apache-2.0
"""What reading less costs: tasks by length by method at equal budgets, or the user's own prompts.

Every method answers the same samples greedily. A row says how many answers are right, how far they
agree with dense attention's, and what was read; differences are paired by sample. Methods take
their turns in the order in which they are named, each on all samples: what matters most is there
first when time is short. A run that was cut off, or is asked for more, goes on
(`lm.long_context.judge`).
"""

import concurrent.futures
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm import tables
from lm.errors import UserError
from lm.long_context import judge as judges
from lm.long_context import quality
from lm.long_context.asking import Questions
from lm.long_context.config import LongContextConfig
from lm.long_context.judge import Asked, Cell, Found, Judge, Name
from lm.long_context.methods import DENSE, Methods
from lm.long_context.options import Budget, Options
from lm.progress import Progress, say
from lm.stages import UNLIMITED, Clock
from lm.workdir import Workdir

GOOD = 0.8  # of dense attention, from which its share is asked for
_ALL = Options()
_SHOWN = ("task", "length", "method", "budget", "accuracy", "agreement", "edit_distance")


def run(
    config: LongContextConfig,
    methods: Methods,
    path: pathlib.Path,
    options: Options = _ALL,
    workdir: Workdir | None = None,
) -> dict[str, Any]:
    """Measures what is not in the workdir yet, and compares.

    workdir: where rows are kept; None: the run that `path` is, none for a Hugging Face directory.

    Returns as `judged`. Raises UserError and DataError.
    """
    return judged(judges.opened(config, methods, path, options, workdir))


def judged(judge: Judge, clock: Clock = UNLIMITED) -> dict[str, Any]:
    """Measures what is not there yet, and compares.

    Returns:
      `rows`; `summary`, per budget the first method (dense aside) against each other; and of that
      method at the first budget, means over all rows: `agreement`, `edit_distance`, `accuracy`, and
      `share_of_dense`, the smallest share of dense accuracy where that is at least 80 % (None:
      nowhere).

    Raises UserError, DataError, and OutOfTime between two rows.
    """
    if jax.process_count() > 1:
        raise UserError("evaluate runs on one process")
    budgets = judge.options.budgets or (str(judge.methods.budget),)
    budgets = tuple(map(Budget.parse, budgets))
    cells = list(judge.cells())
    # whatever is refused is refused before anything is measured
    plans = [judge.plan(cell, budgets) for cell in cells]
    found = measured(judge, cells, plans, clock)
    rows = list({row["key"]: row for one in found for row, _ in one.values()}.values())
    say("\n" + tables.text(tables.table(rows, columns=_SHOWN)))
    return {"rows": rows, **summary(judge, budgets, cells, found)}


def measured(
    judge: Judge,
    cells: Sequence[Cell],
    plans: Sequence[Mapping[Name, Asked]],
    clock: Clock = UNLIMITED,
) -> list[Found]:
    """What was planned for each cell: a method on all cells, then the next one.

    Raises UserError and DataError, before anything is measured, and OutOfTime between two rows.
    """
    missing = [judge.missing(plan) for plan in plans]
    made = _made([cell for cell, left in zip(cells, missing, strict=True) if left])
    for name in dict.fromkeys(asked.method for left in missing for asked in left):
        todo = [
            (cell, plan, asked)
            for cell, plan, left in zip(cells, plans, missing, strict=True)
            for asked in left
            if asked.method == name
        ]
        with Progress(name, sum(cell.count for cell, _, _ in todo)) as progress:
            for cell, plan, asked in todo:
                clock.check()
                judge.answer(made[cell.label], asked, progress)
                judge.settle(made[cell.label], plan)
    return [judge.found(plan) for plan in plans]


def _made(cells: Sequence[Cell]) -> dict[str, Questions]:
    """The questions by label: tokenizers leave Python's lock, so cores share them."""
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pending = [pool.submit(cell.make) for cell in cells]
        try:
            return {c.label: x.result() for c, x in zip(cells, pending, strict=True)}
        finally:
            for one in pending:
                one.cancel()


def summary(
    judge: Judge,
    budgets: Sequence[Budget],
    cells: Sequence[Cell],
    found: Sequence[Found],
) -> dict[str, Any]:
    """What `run` returns beside the rows."""
    names = [name for name in judge.names if name != DENSE]
    first, compared = (names or [DENSE])[0], []
    kind = "scores" if found[0][DENSE, None][1]["scores"] is not None else "agreement"

    def of(method: str, budget: Budget, kind: str) -> dict[str, list[float]]:
        made = {}
        for cell, one in zip(cells, found, strict=True):
            total = None if method == DENSE else budget.total(judge.methods, cell.length)
            made[cell.label] = one[method, total][1][kind]
        return made

    for budget in budgets if names else ():
        mine = of(first, budget, kind)
        for other in (DENSE, *names[1:]):
            theirs = of(other, budget, kind)
            pairs = {label: (mine[label], theirs[label]) for label in mine}
            about = {"budget": budget.text, "method": first, "against": other}
            about["of"] = "accuracy" if kind == "scores" else "agreement"
            compared.append(about | quality.against(pairs))
    out: dict[str, Any] = {"summary": compared, "method": first, "accuracy": None}
    for name in ("agreement", "edit_distance"):
        out[name] = _mean(of(first, budgets[0], name))
    out["share_of_dense"] = None
    if kind == "scores":
        mine, dense = of(first, budgets[0], kind), of(DENSE, budgets[0], kind)
        out["accuracy"] = _mean(mine)
        pairs = {label: (mine[label], dense[label]) for label in mine}
        out["share_of_dense"] = quality.least_share(pairs, GOOD)
    return out


def _mean(cells: Mapping[str, Sequence[float]]) -> float:
    return float(np.mean([np.mean(values) for values in cells.values()]))
