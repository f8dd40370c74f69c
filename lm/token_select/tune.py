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

import numpy as np

from lm import tuned
from lm.config import require_positive
from lm.errors import UserError
from lm.long_context import evaluate as asking
from lm.long_context import quality
from lm.long_context.evaluate import Answers, Questions
from lm.progress import Progress, say
from lm.token_select import baselines, choice, evaluate
from lm.token_select.config import SelectConfig, TokenSelectConfig
from lm.token_select.method import TokenSelect
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
    data: evaluate.Options = evaluate.Options()

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


class Trial:
    """Measures settings on fixed questions, each once."""

    def __init__(self, judge: evaluate.Judge, questions: Sequence[Questions]):
        self._judge, self._questions = judge, questions
        dense = baselines.build(baselines.DENSE, judge.config.select, None)
        with Progress("dense", sum(len(q.prompts) for q in questions)) as progress:
            self._dense = [self._ask(dense, q, progress) for q in questions]
        self._known: dict[SelectConfig, dict[str, Any]] = {}

    def __call__(self, select: SelectConfig) -> dict[str, Any]:
        """A row: the settings, mean agreement with dense decoding, and what was read."""
        if select not in self._known:
            pairs, reads = [], []
            name = " ".join(f"{key}={getattr(select, key):g}" for key in choice.FIELDS)
            with Progress(name, sum(len(q.prompts) for q in self._questions)) as progress:
                for questions, dense in zip(self._questions, self._dense, strict=True):
                    answers = self._ask(TokenSelect(select), questions, progress)
                    pairs += zip(answers.tokens, dense.tokens, strict=True)
                    reads.append(answers.reads)
            agreement = [quality.agreement(*pair) for pair in pairs]
            reads = np.concatenate(reads)
            row = {
                "kind": "tune",
                "method": "token_select",
                **{key: getattr(select, key) for key in choice.FIELDS},
                "budget": select.budget,
                "agreement": float(np.mean(agreement)),
                "agreement_ci95": list(quality.interval(agreement)),
                "edit_distance": float(np.mean([quality.edit_distance(*pair) for pair in pairs])),
                "tokens_read": None if np.isnan(reads).all() else float(np.nanmean(reads)),
                "samples": len(pairs),
            }
            say(f"{name}: agreement {row['agreement']:.3f}")
            self._known[select] = row
        return self._known[select]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self._known.values())

    def _ask(self, policy: Any, questions: Questions, progress: Progress) -> Answers:
        batch = self._judge.options.batch_size
        return asking.ask(self._judge.method(policy), questions, batch, progress)


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
    judge = evaluate.opened(config, path, options.data)
    cells = list(judge.cells())
    shortest = min(cell.length for cell in cells)
    candidates = settings(judge.config.select, options, shortest)
    TokenSelect(candidates[0][0]).check(judge.speaker.model, None, shortest)
    workdir.create(config)
    if not (workdir.path / "config.json").exists():  # a run keeps its own
        workdir.record(config)
    trial = Trial(judge, [cell.make() for cell in cells])
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

    found = []
    for group in candidates:
        low, high = 0, len(group)  # below low none reaches it, from high on all do
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if good(group[middle]) else (middle + 1, high)
        if low < len(group):
            found.append(group[low])
    if not found:
        return None
    best = min(found, key=lambda x: (x.budget, -measure(x)["agreement"]))
    for theta in sorted(set(thetas)):
        reused = dataclasses.replace(best, reuse=theta)
        if reused.budget + reused.slack <= length and good(reused):
            return reused
    return best
