# SPDX-License-Identifier: Apache-2.0
"""Chooses who drafts, how much of a prompt is kept, the window and the pooling, on the user's data:
the least that agrees with dense decoding as far as is asked for.

For every draft, window and pooling the smallest budget is sought by halving, which takes agreement
to grow with it. Of what reaches the target the smallest budget wins, then the smallest draft.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm import tuned
from lm.config import require_positive
from lm.draft_inference import choice, draft
from lm.draft_inference.config import DraftConfig, DraftSettings
from lm.draft_inference.draft import Draft
from lm.draft_inference.methods import Methods
from lm.errors import UserError
from lm.long_context import judge as judges
from lm.long_context import trials
from lm.long_context.options import Options as Asked
from lm.long_context.policy import Method
from lm.progress import say
from lm.workdir import Workdir

METHOD = "speckv"
_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of a context, kept by default


@dataclasses.dataclass(frozen=True)
class Options:
    """What is tried, and on what.

    drafts: checkpoints; () takes the config's.
    layers: also so many first layers of the target draft.
    budgets: () tries shares of the shortest context, from a 64th to a half, as far as they can be
      kept.
    windows, kernels: () takes the config's.
    data: prompts as for `evaluate`, or samples of its tasks; methods and budgets do not count.
    """

    target: float = 0.98
    drafts: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    budgets: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    kernels: tuple[int, ...] = ()
    data: Asked = Asked()

    def __post_init__(self):
        if not 0 < self.target <= 1:
            raise UserError(f"--target_agreement={self.target} must be above 0 and at most 1")
        for name in ("layers", "budgets", "windows", "kernels"):
            for value in getattr(self, name):
                require_positive(f"--{name}", value)


def run(
    config: DraftConfig,
    target: pathlib.Path,
    workdir: Workdir,
    options: Options,
) -> dict[str, Any]:
    """Tries settings; `chosen`, None where none reaches the target, also goes to tuned.json of the
    workdir, and all `rows` to its eval.jsonl.

    Raises UserError, DataError and RunError.
    """
    judge = judges.opened(config, Methods(config.draft), target, options.data)
    fingerprint = judge.speaker.tokenizer.fingerprint
    loaded: dict[str, Draft] = {}
    for path in options.drafts or filter(None, (config.draft.path,)):
        loaded[path] = draft.load(path, dtype=options.data.dtype)
        loaded[path].check_tokenizer(fingerprint)
    cells = list(judge.cells())
    shortest = min(cell.length for cell in cells)
    candidates = settings(config.draft, options, tuple(loaded), shortest)

    def policy(one: DraftSettings) -> Method:
        return Methods(one, loaded.get(one.path)).build(METHOD, one.budget)

    def fits(one: DraftSettings) -> bool:
        try:
            policy(one).check(judge.speaker.model, None, shortest)
        except UserError as error:
            if options.budgets or one is candidates[0][0]:
                raise
            say(f"without a budget of {one.budget}: {error}")
            return False
        return True

    candidates = [[one for one in group if fits(one)] for group in candidates]
    candidates = [group for group in candidates if group]
    workdir.create(config)
    if not (workdir.path / "config.json").exists():  # a run keeps its own
        workdir.record(config)
    questions = [cell.make() for cell in cells]
    trial = trials.Trial(judge, questions, METHOD, _fields, policy)
    sizes = {path: one.model.num_layers * one.model.embed_dim**2 for path, one in loaded.items()}
    found = choose(trial, candidates, options.target, lambda one: sizes.get(one.path, 0))
    for row in trial.rows:
        workdir.append("eval.jsonl", row)
    if found is None:
        return {"chosen": None, "agreement": None, "rows": trial.rows}
    row = trial(found)
    chosen = {name: getattr(found, name) for name in choice.FIELDS}
    chosen |= {name: row[name] for name in ("agreement", "tokens_read")}
    chosen |= {"target": options.target, "hashes": judge.hashes}
    tuned.write(workdir, chosen, trial.rows)
    return {"chosen": chosen, "agreement": row["agreement"], "rows": trial.rows}


def _fields(settings: DraftSettings) -> dict[str, Any]:
    drafter = settings.path or f"layers:{settings.layers}"
    return {"draft": drafter} | {
        name: getattr(settings, name) for name in ("budget", "window", "kernel")
    }


def settings(
    plain: DraftSettings, options: Options, drafts: Sequence[str], length: int
) -> list[list[DraftSettings]]:
    """Per draft, window and pooling the settings by rising budget.

    Raises UserError without a draft, or where every setting keeps the whole context.
    """
    drafters = [{"path": path, "layers": 0} for path in drafts]
    layers = options.layers or ((plain.layers,) if plain.layers and not drafts else ())
    drafters += [{"path": "", "layers": n} for n in layers]
    if not drafters:
        raise UserError("which draft? name some with --drafts, or --layers of the target")
    budgets = options.budgets or tuple(max(1, round(share * length)) for share in _SHARES)
    groups = []
    for drafter in drafters:
        for window in sorted(set(options.windows)) or (plain.window,):
            for kernel in sorted(set(options.kernels)) or (plain.kernel,):
                fields = {**drafter, "window": window, "kernel": kernel, "coverage": 0.0}
                one = dataclasses.replace(plain, **fields)
                kept = [n for n in sorted(set(budgets)) if window < n < length]
                groups.append([dataclasses.replace(one, budget=n) for n in kept])
    groups = [group for group in groups if group]
    if not groups:
        raise UserError(
            f"no budget is above the window and below the context of {length}: try others"
        )
    return groups


def choose(
    measure: Callable[[DraftSettings], Mapping[str, Any]],
    candidates: Sequence[Sequence[DraftSettings]],
    target: float,
    size: Callable[[DraftSettings], float],
) -> DraftSettings | None:
    """The smallest budget of those whose agreement reaches the target; of equal ones the smallest
    draft, then the best agreement."""

    def good(settings: DraftSettings) -> bool:
        return measure(settings)["agreement"] >= target

    found = [first for group in candidates if (first := trials.first(group, good)) is not None]
    return min(found, key=lambda x: (x.budget, size(x), -measure(x)["agreement"]), default=None)
