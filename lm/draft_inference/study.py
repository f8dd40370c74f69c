# SPDX-License-Identifier: Apache-2.0
"""Draft inference measured on pairs of target and draft that were trained for it: every method at
equal budgets, over seeds of samples and, where there are several pairs, over those.

| stage | what it leaves in the workdir |
|---|---|
| train | weights/target0, weights/draft0, and of the next pairs |
| evaluate | eval.jsonl (rows of methods, of the drafts, comparisons) and answers.jsonl |
| plot | plots/ |
"""

import dataclasses
import functools
from typing import Any

from lm import studies
from lm.config import require_choice, require_positive
from lm.draft_inference import draft as drafts
from lm.draft_inference import evaluate, training
from lm.draft_inference.config import DraftConfig
from lm.draft_inference.evaluate import Pair
from lm.draft_inference.methods import Methods
from lm.long_context import figures, study
from lm.long_context.judge import Judge
from lm.long_context.options import Options
from lm.studies import Study
from lm.workdir import Workdir

STAGES = ("train", "evaluate", "plot")


def run(
    target: DraftConfig,
    draft: DraftConfig,
    workdir: Workdir,
    options: Options,
    pairs: int = 1,
    stage: str = "all",
    minutes: float | None = None,
) -> dict[str, Any]:
    """Runs a stage, or all of them, for at most `minutes`; what is finished is not done again.

    pairs: pair number n is trained with n added to `train.seed`.
    options: of `evaluate`.

    Returns `stage`, `done`, and of a stage that is done: `training` (the last metrics by model),
    `comparisons` and `draft` (as of `evaluate.judged`), or `plots`.

    Raises UserError, DataError and RunError.
    """
    require_choice("--stage", stage, (*STAGES, "all"))
    require_positive("--pairs", pairs)
    training.check(target, draft)
    calls = {
        "train": functools.partial(_train, target, draft, pairs),
        "evaluate": functools.partial(_evaluate, target, options, pairs),
        "plot": _plot,
    }
    return studies.run(target, workdir, calls, stage, minutes)


def _train(
    target: DraftConfig, draft: DraftConfig, pairs: int, work: Study
) -> dict[str, Any] | None:
    found = {}
    for number in range(pairs):
        both = [_seeded(config, number) for config in (target, draft)]
        for stage, config in zip(training.STAGES, both, strict=True):
            name, folder = f"{stage}{number}", work.runs / f"pair{number}"
            call = functools.partial(training.run, *both, folder, (stage,))
            made = studies.MADE_OF_TASKS
            if not studies.trained(work, name, config, call, folder / stage, made):
                return None
            found[name] = studies.metrics(work, name)
    return {"training": found}


def _seeded(config: DraftConfig, number: int) -> DraftConfig:
    own = dataclasses.replace(config.train, seed=config.train.seed + number)
    return dataclasses.replace(config, train=own)


def _evaluate(config: DraftConfig, options: Options, pairs: int, work: Study) -> dict[str, Any]:
    made = [_pair(config, options, work, number) for number in range(pairs)]
    found = evaluate.judged(config, made, options, work.clock)
    return {name: found[name] for name in ("comparisons", "draft", "accuracy", "agreement")}


def _pair(config: DraftConfig, options: Options, work: Study, number: int) -> Pair:
    target, draft = (f"{stage}{number}" for stage in training.STAGES)
    drafter = drafts.of_speaker(study.speaker(work, draft, DraftConfig))
    speaker, label = study.speaker(work, target, DraftConfig), str(work.weights(target))
    drafter.check_tokenizer(speaker.tokenizer.fingerprint)
    drafter.check(speaker.model)
    methods = Methods(config.draft, drafter)
    judge = Judge(config, methods, options, speaker, label, False, work.workdir)
    return Pair(judge, str(work.weights(draft)))


def _plot(work: Study) -> dict[str, Any]:
    drawn = figures.draw(figures.gather([work.workdir.path]))
    return {"plots": figures.save(drawn, work.workdir.path / "plots")}
