# SPDX-License-Identifier: Apache-2.0
"""What dropping costs in quality: methods by budget, task and length, on one or more trained pairs
of target and draft; who is above whom; and how good the draft is.

Rows are measured, kept and skipped as in `lm.long_context.evaluate`, in the folder that is named or
in the target's run; a pair answers for a method on all tasks before the next method has its turn.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm import tables
from lm.draft_inference import choice, comparison, draft, fidelity
from lm.draft_inference.config import DraftConfig, DraftSettings
from lm.draft_inference.draft import Drafter
from lm.draft_inference.method import Drafted
from lm.draft_inference.methods import Methods
from lm.draft_inference.proposals import Opener
from lm.errors import UserError
from lm.long_context import asking, evaluate
from lm.long_context import judge as judges
from lm.long_context.judge import ROWS, Cell, Found, Judge
from lm.long_context.methods import DENSE
from lm.long_context.options import QUESTIONS, Budget, Options
from lm.progress import Progress, say
from lm.stages import UNLIMITED, Clock
from lm.workdir import Workdir

# the paper's methods and those it is compared with, other baselines, what it does not have
ORDER = (
    "speckv",
    "specpc",
    "speckv_pc",
    DENSE,
    "snapkv",
    "streaming_llm",
    "spec_prefill",
    "laq",
    "pyramidkv",
    "adakv",
    "h2o",
    "tova",
    "knorm",
    "keydiff",
    "expected_attention",
    "random",
    "ada_speckv",
)
USUAL = (*ORDER[:8], ORDER[-1])
_BEYOND = {"speckv_pc": "speckv", "specpc": "spec_prefill", "ada_speckv": "speckv"}
_SHOWN = ("method", "budget", "task", "length", "questions", "accuracy", "ci95", "agreement")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A target and what drafts for it."""

    judge: Judge
    draft: str  # as rows call it; "": none

    def __post_init__(self) -> None:
        if self.draft:
            own = {"draft": self.draft}
            self.judge.about = lambda policy: own if isinstance(policy, Drafted) else {}


def opened(
    config: DraftConfig,
    target: pathlib.Path,
    path: str | Opener,
    options: Options,
    workdir: Workdir | None = None,
) -> Pair:
    """A target with its draft: a workdir or a Hugging Face directory each.

    path: of the draft; "": what the config names, if anything; or what opens the target's own
      heads.

    Raises UserError: no such checkpoint, or two that do not read the same tokens.
    """
    settings = config.draft
    if not isinstance(path, str):
        return _by_heads(config, target, path, options, workdir)
    if path and settings.layers:
        raise UserError("--draft and draft.layers both name a draft: pass one of them")
    settings = dataclasses.replace(settings, path=path or settings.path)
    if options.tuned:
        return _tuned(config, target, path, options, workdir)
    loaded = draft.load(settings.path, dtype=options.dtype) if settings.path else None
    methods = Methods(settings, loaded)
    judge = judges.opened(config, methods, target, options, workdir)
    if loaded is not None:
        loaded.check_tokenizer(judge.speaker.tokenizer.fingerprint)
    drafter = methods.drafter(methods.budget)
    if drafter is not None:
        drafter.check(judge.speaker.model)
    return Pair(judge, named(settings))


def named(settings: DraftSettings) -> str:
    """The draft of the settings as rows call it; "": none."""
    return settings.path or (f"layers:{settings.layers}" if settings.layers else "")


def _by_heads(
    config: DraftConfig,
    target: pathlib.Path,
    opener: Opener,
    options: Options,
    workdir: Workdir | None,
) -> Pair:
    """A target that drafts by its own heads. Raises UserError where another draft is named."""
    for given in (named(config.draft), options.tuned and f"--tuned={options.tuned}"):
        if given:
            raise UserError(f"--heads and {given} both name a draft: pass one of them")
    methods = Methods(config.draft)
    judge = judges.opened(config, methods, target, options, workdir)
    proposals = opener(judge.speaker)
    judge.methods = dataclasses.replace(methods, proposals=proposals)
    return Pair(judge, proposals.name)


def _tuned(
    config: DraftConfig,
    target: pathlib.Path,
    path: str,
    options: Options,
    workdir: Workdir | None,
) -> Pair:
    """With the settings of `tune` and its draft. Raises UserError where another is named."""
    chosen = choice.read(pathlib.Path(options.tuned))
    if path and path != chosen["path"]:
        raise UserError(f"--tuned={options.tuned} was made with another draft than --draft={path}")
    own = dataclasses.replace(config.draft, **{name: chosen[name] for name in choice.FIELDS})
    plain = dataclasses.replace(options, tuned="")
    pair = opened(dataclasses.replace(config, draft=own), target, "", plain, workdir)
    choice.apply(chosen, own, pair.judge.hashes)  # says where it was for another model
    return pair


def run(
    config: DraftConfig,
    targets: Sequence[pathlib.Path],
    drafts: Sequence[str | Opener],
    options: Options,
    workdir: Workdir | None = None,
) -> dict[str, Any]:
    """Measures what is not in the workdir yet, and compares.

    Args:
      targets, drafts: trained pairs, side by side; a single draft is that of all targets.

    Returns as `judged`. Raises UserError and DataError.
    """
    if len(drafts) not in (1, len(targets)):
        raise UserError(f"{len(drafts)} drafts for {len(targets)} targets: one each, or one")
    drafts = list(drafts) * (len(targets) if len(drafts) == 1 else 1)
    pairs = [
        opened(config, target, path, options, workdir)
        for target, path in zip(targets, drafts, strict=True)
    ]
    return judged(config, pairs, options)


def judged(
    config: DraftConfig, pairs: Sequence[Pair], options: Options, clock: Clock = UNLIMITED
) -> dict[str, Any]:
    """Measures what is not there yet, and compares.

    Without `options.methods` the usual ones take their turns, in their order, where all budgets
    leave room for them.

    Returns:
      `rows` in the order of `ORDER`; `comparisons`, a row of `comparison.compare` for every budget
      and way of asking: SpecKV against each other method, SpecKV-PC against SpecKV, SpecPC against
      SpecPrefill; `draft`, rows of `fidelity.row`; and of the first method (dense aside) at the
      first budget the means `accuracy` and `agreement`.

    Raises UserError, DataError, and OutOfTime between two rows.
    """
    budgets = options.budgets or (str(pairs[0].judge.methods.budget),)
    budgets = tuple(map(Budget.parse, budgets))
    cells = [list(pair.judge.cells()) for pair in pairs]
    if not options.methods:
        for pair, own in zip(pairs, cells, strict=True):
            pair.judge.names = USUAL
            pair.judge.names = _possible(pair.judge, own, budgets)
    plans = [
        [pair.judge.plan(cell, budgets) for cell in own]
        for pair, own in zip(pairs, cells, strict=True)
    ]
    found, quality = [], []
    for pair, own, planned in zip(pairs, cells, plans, strict=True):
        if len(pairs) > 1:
            say(f"{pair.judge.checkpoint} with {pair.draft or 'no draft'}")
        found.append(evaluate.measured(pair.judge, own, planned, clock))
    for pair, own in zip(pairs, cells, strict=True):
        quality += _fidelity(pair, own, budgets, config, clock)
    rows = _rows(found)
    say("\n" + tables.text(tables.table(rows, columns=_SHOWN)))
    compared = comparisons(pairs, budgets, cells, found)
    _keep(compared, pairs)
    means = _means(pairs[0], budgets[0], cells[0], found[0])
    return {"rows": rows, "comparisons": compared, "draft": quality, **means}


def _keep(compared: Sequence[dict[str, Any]], pairs: Sequence[Pair]) -> None:
    """Appends comparisons, of all that was compared last: a later one takes the place of one with
    the same key."""
    workdir, drafts = pairs[0].judge.workdir, ",".join(pair.draft for pair in pairs)
    for row in compared if workdir is not None else ():
        key = "{method} {against} {budget} {questions}".format_map(row)
        workdir.append(ROWS, row | {"draft": drafts, "key": f"{key} {drafts}"})


def _possible(judge: Judge, cells: Sequence[Cell], budgets: Sequence[Budget]) -> tuple[str, ...]:
    """Of the usual methods those that all budgets leave room for; says which do not."""
    kept = []
    for name in judge.names:
        try:
            for cell in cells if name != DENSE else ():
                for budget in budgets:
                    judge.methods.build(name, budget.total(judge.methods, cell.length))
        except UserError as error:
            if name == judge.names[0]:
                raise
            say(f"without {name}: {error}")
            continue
        kept.append(name)
    return tuple(kept)


def _rows(found: Sequence[Sequence[Found]]) -> list[dict[str, Any]]:
    rows = {}
    for number, measured in enumerate(found):
        for one in measured:
            for row, _ in one.values():
                rows[row["key"]] = row | ({"pair": number} if len(found) > 1 else {})
    place = {name: number for number, name in enumerate(ORDER)}
    return sorted(rows.values(), key=lambda row: place.get(row["method"], len(ORDER)))


def comparisons(
    pairs: Sequence[Pair],
    budgets: Sequence[Budget],
    cells: Sequence[Sequence[Cell]],
    found: Sequence[Sequence[Found]],
) -> list[dict[str, Any]]:
    """What `run` returns of them; none without right answers."""
    if any(one[DENSE, None][1]["scores"] is None for measured in found for one in measured):
        return []
    names = [name for name in ORDER if name in pairs[0].judge.names or name == DENSE]
    wanted = [(first, last) for first, last in _BEYOND.items() if {first, last} <= set(names)]
    if "speckv" in names:
        others = [name for name in names if name not in ("speckv", *_BEYOND)]
        wanted = [("speckv", name) for name in others] + wanted
    out = []
    for budget in budgets:
        for agnostic in sorted({cell.agnostic for cell in cells[0]}):
            for first, last in wanted:
                made = _scores(pairs, budget, cells, found, agnostic, (first, last, DENSE))
                about = {"kind": "comparison", "budget": budget.text, "method": first}
                about |= {"against": last, "questions": QUESTIONS[agnostic]}
                out.append(about | comparison.compare(made))
    return out


def _scores(pairs, budget, cells, found, agnostic, names) -> dict[str, comparison.Cell]:
    """Per task and length three methods' scores, of each pair over the samples of all seeds."""
    made: dict[str, list[list[list[float]]]] = {}
    for number, (pair, own, measured) in enumerate(zip(pairs, cells, found, strict=True)):
        for cell, one in zip(own, measured, strict=True):
            if cell.agnostic != agnostic:
                continue
            lists = made.setdefault(f"{cell.name} {cell.length}", [[], [], []])
            total = budget.total(pair.judge.methods, cell.length)
            for name, scores in zip(names, lists, strict=True):
                if len(scores) <= number:
                    scores.append([])
                scores[number] += one[name, None if name == DENSE else total][1]["scores"]
    return {name: comparison.Cell(*lists) for name, lists in made.items()}


def _fidelity(
    pair: Pair,
    cells: Sequence[Cell],
    budgets: Sequence[Budget],
    config: DraftConfig,
    clock: Clock,
) -> list[dict[str, Any]]:
    """How good the draft is, at the first budget; nothing without one. Finished rows are kept."""
    if not pair.draft:
        return []
    judge, rows = pair.judge, []
    workdir, kept = judge.workdir, {}
    if workdir is not None:
        kept = {row["key"]: row for row in workdir.rows(ROWS) if row.get("kind") == "draft"}
    asked = [cell for cell in cells if not cell.agnostic]
    with Progress("draft", len(asked)) as progress:
        for cell in asked:
            budget = budgets[0].total(judge.methods, cell.length)
            drafter = judge.methods.drafter(budget)
            key = _key(pair, drafter, cell, budget, config)
            if key not in kept:
                clock.check()
                questions, options = cell.make(), judge.options
                made = fidelity.measure(
                    judge.speaker,
                    drafter,
                    config.draft.prompt,
                    questions,
                    budget,
                    options.batch_size,
                    judge.implementation,
                )
                row = fidelity.row(made, questions, budget)
                row |= {"draft": pair.draft, "checkpoint": judge.checkpoint, "key": key}
                kept[key] = row
                if workdir is not None:
                    workdir.append(ROWS, row)
            rows.append(kept[key])
            progress.advance()
    return rows


def _key(pair: Pair, drafter: Drafter, cell: Cell, budget: int, config: DraftConfig) -> str:
    judge = pair.judge
    parts = [cell.name, cell.length, cell.seed, cell.count, cell.about, judge.chat, budget]
    settings = repr((drafter, config.draft.prompt, judge.speaker.model.dtype))
    return asking.fingerprint([parts, settings, judge.hashes])


def _means(
    pair: Pair, budget: Budget, cells: Sequence[Cell], found: Sequence[Found]
) -> dict[str, Any]:
    """Of the first method at the first budget."""
    names = [name for name in pair.judge.names if name != DENSE] or [DENSE]
    made = [
        one[names[0], None if names[0] == DENSE else budget.total(pair.judge.methods, cell.length)]
        for cell, one in zip(cells, found, strict=True)
    ]
    scores = [answers["scores"] for _, answers in made]
    known = [x for x in scores if x is not None]
    return {
        "method": names[0],
        "accuracy": float(np.mean([np.mean(x) for x in known])) if known else None,
        "agreement": float(np.mean([row["agreement"] for row, _ in made])),
    }
