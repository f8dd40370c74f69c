# SPDX-License-Identifier: Apache-2.0
"""Chooses how many tokens to read, how, and how long to go on with them, on the user's data: the
least that agrees with dense decoding as far as is asked for.

For every window and pooling the smallest k is sought by halving, which takes agreement to grow with
k; the setting that reads the least wins. With it, the lowest theta of the Selection Cache that
still reaches the target is taken, none if no theta does.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm import tuned
from lm.config import require_positive
from lm.errors import UserError
from lm.long_context import judge as judges
from lm.long_context import trials
from lm.long_context.options import Options as Asked
from lm.token_select import choice
from lm.token_select.config import SelectConfig, TokenSelectConfig
from lm.token_select.method import TokenSelect
from lm.token_select.methods import OWN, Methods
from lm.workdir import Workdir

_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of a context, k by default


@dataclasses.dataclass(frozen=True)
class Options:
    """What is tried, and on what.

    ks: () tries shares of the shortest context, from a 64th to a half.
    n_locals: () tries the config's and half of it.
    thetas: of the Selection Cache; () leaves it off.
    data: prompts as for `evaluate.run`, or samples of its tasks; methods and budgets do not count.
    """

    target: float = 0.98
    ks: tuple[int, ...] = ()
    n_locals: tuple[int, ...] = ()
    pools: tuple[int, ...] = (0, 5)
    thetas: tuple[float, ...] = (0.9, 0.95)
    data: Asked = Asked()

    def __post_init__(self):
        if not 0 < self.target <= 1:
            raise UserError(f"--target={self.target} must be above 0 and at most 1")
        for name in ("ks", "n_locals"):
            for value in getattr(self, name):
                require_positive(f"--{name}", value)
        if not self.pools:
            raise UserError("--pools: at least one is needed; 0 is no pooling")
        if any(not 0 < theta <= 1 for theta in self.thetas):
            raise UserError("--thetas must be above 0 and at most 1")


def run(
    config: TokenSelectConfig,
    path: pathlib.Path,
    workdir: Workdir,
    options: Options = Options(),
) -> dict[str, Any]:
    """Tries settings; `chosen`, None where none reaches the target, also goes to tuned.json of the
    workdir, and all `rows` to its eval.jsonl.

    Raises UserError, DataError and RunError.
    """
    judge = judges.opened(config, Methods(config.select), path, options.data)
    cells = list(judge.cells())
    shortest = min(cell.length for cell in cells)
    candidates = settings(judge.methods.select, options, shortest)
    TokenSelect(candidates[0][0]).check(judge.speaker.model, None, shortest)
    workdir.create(config)
    if not (workdir.path / "config.json").exists():  # a run keeps its own
        workdir.record(config)
    questions = [cell.make() for cell in cells]
    trial = trials.Trial(judge, questions, OWN, _fields, TokenSelect)
    found = choose(trial, candidates, options.thetas, options.target, shortest)
    for row in trial.rows:
        workdir.append("eval.jsonl", row)
    if found is None:
        return {"chosen": None, "agreement": None, "rows": trial.rows}
    row = trial(found)
    chosen = {key: row[key] for key in (*choice.FIELDS, "agreement", "tokens_read")}
    chosen |= {"target": options.target, "hashes": judge.hashes}
    tuned.write(workdir, chosen, trial.rows)
    return {"chosen": chosen, "agreement": row["agreement"], "rows": trial.rows}


def _fields(select: SelectConfig) -> dict[str, Any]:
    return {key: getattr(select, key) for key in (*choice.FIELDS, "budget")}


def settings(select: SelectConfig, options: Options, length: int) -> list[list[SelectConfig]]:
    """Per window and pooling the settings by rising k, all of which read less than the context.

    Raises UserError when none does.
    """
    ks = options.ks or tuple(max(1, round(share * length)) for share in _SHARES)
    locals_ = options.n_locals or (select.n_local // 2 or 1, select.n_local)
    plain = dataclasses.replace(select, reuse=0.0, reuse_prefill=False, guard_every=0)
    groups = []
    for n_local in sorted(set(locals_)):
        for pool in sorted(set(options.pools)):
            chunk = min(select.chunk, n_local)
            one = dataclasses.replace(plain, n_local=n_local, chunk=chunk, pool=pool)
            made = [dataclasses.replace(one, k=k) for k in sorted(set(ks))]
            groups.append([found for found in made if found.budget <= length])
    groups = [group for group in groups if group]
    if not groups:
        raise UserError(f"every setting reads the whole context of {length}: try smaller ones")
    return groups


def choose(
    measure: Callable[[SelectConfig], Mapping[str, Any]],
    candidates: Sequence[Sequence[SelectConfig]],
    thetas: Sequence[float],
    target: float,
    length: int,
) -> SelectConfig | None:
    """The setting that reads the least of those whose agreement reaches the target.

    length: of a context, within which the Selection Cache must read.
    """

    def good(select: SelectConfig) -> bool:
        return measure(select)["agreement"] >= target

    found = [first for group in candidates if (first := trials.first(group, good)) is not None]
    if not found:
        return None
    best = min(found, key=lambda x: (x.budget, -measure(x)["agreement"]))
    for theta in sorted(set(thetas)):
        reused = dataclasses.replace(best, reuse=theta)
        if reused.budget + reused.slack <= length and good(reused):
            return reused
    return best
