# SPDX-License-Identifier: Apache-2.0
"""Token selection measured on one model that was trained for it: what is kept of dense accuracy,
beside the baselines at equal budgets, in three settings.

| stage | what it leaves in the workdir |
|---|---|
| train | weights/model |
| evaluate | eval.jsonl and answers.jsonl in a folder for each of `SETTINGS` |
| plot | plots/ in the same folders |
"""

import dataclasses
import functools
from typing import Any

from lm import studies
from lm.config import require_choice
from lm.long_context import evaluate, figures, study, training
from lm.long_context.judge import ANSWERS, ROWS, Judge
from lm.long_context.methods import DENSE
from lm.long_context.options import Options
from lm.prompting import Speaker
from lm.studies import Study
from lm.token_select.config import TokenSelectConfig
from lm.token_select.methods import OWN, Methods
from lm.workdir import Workdir

STAGES = ("train", "evaluate", "plot")
# how keys are rotated, what positions a step gives to those that it reads, and whether the prompt
# is read whole
SETTINGS = {
    "read_packed": {"rope": "read", "positions": "packed", "prefill": "select"},
    "write_true": {"rope": "write", "positions": "true", "prefill": "select"},
    "whole_prompt": {"rope": "write", "positions": "true", "prefill": "dense"},
}
FIRST = (DENSE, OWN, "streaming_llm", "snapkv")  # in all settings before any other method
_MODEL = "model"


def run(
    config: TokenSelectConfig,
    workdir: Workdir,
    options: Options,
    stage: str = "all",
    minutes: float | None = None,
) -> dict[str, Any]:
    """Runs a stage, or all of them, for at most `minutes`; what is finished is not done again.

    options: of `evaluate`; without methods the main ones take their turns first.

    Returns `stage`, `done`, and of a stage that is done: `training` (the last metrics), `summary`
    (by setting, as of `evaluate.judged`), or `plots`.

    Raises UserError, DataError and RunError.
    """
    require_choice("--stage", stage, (*STAGES, "all"))
    training.check(config)
    calls = {
        "train": functools.partial(_train, config),
        "evaluate": functools.partial(_evaluate, config, options),
        "plot": _plot,
    }
    return studies.run(config, workdir, calls, stage, minutes)


def _train(config: TokenSelectConfig, work: Study) -> dict[str, Any] | None:
    folder = work.runs / _MODEL
    call = functools.partial(training.run, config, Workdir(folder))
    if not studies.trained(work, _MODEL, config, call, folder, studies.MADE_OF_TASKS):
        return None
    return {"training": studies.metrics(work, _MODEL)}


def _evaluate(config: TokenSelectConfig, options: Options, work: Study) -> dict[str, Any]:
    speaker, found = study.speaker(work, _MODEL, TokenSelectConfig), {}
    rounds = [options.methods] if options.methods else [FIRST, ()]
    for methods in rounds:
        for name in SETTINGS:
            judge = _judge(
                config, dataclasses.replace(options, methods=methods), work, name, speaker
            )
            found[name] = evaluate.judged(judge, work.clock)
    keys = ("summary", "method", "accuracy", "agreement", "share_of_dense")
    return {"summary": {name: {key: one[key] for key in keys} for name, one in found.items()}}


def _judge(
    config: TokenSelectConfig, options: Options, work: Study, name: str, speaker: Speaker
) -> Judge:
    select = dataclasses.replace(config.select, **SETTINGS[name])
    config, workdir = dataclasses.replace(config, select=select), _folder(work, name)
    workdir.create(config)
    workdir.record(config)
    for other in SETTINGS:
        if other != name:
            _take_dense(_folder(work, other), workdir)
    label = str(work.weights(_MODEL))
    return Judge(config, Methods(select), options, speaker, label, False, workdir)


def _take_dense(source: Workdir, destination: Workdir) -> None:
    """Dense attention does not depend on the setting: what was measured in one is every one's."""
    rows = [row for row in source.rows(ROWS) if row.get("method") == DENSE]
    known = {row.get("key") for row in destination.rows(ROWS)}
    wanted = {row["key"]: row for row in rows if row["key"] not in known}
    for made in source.rows(ANSWERS) if wanted else ():
        if made["key"] in wanted:
            destination.append(ANSWERS, made)
            destination.append(ROWS, wanted.pop(made["key"]))


def _plot(work: Study) -> dict[str, Any]:
    plots = []
    for name in SETTINGS:
        folder = _folder(work, name)
        plots += figures.save(figures.draw(figures.gather([folder.path])), folder.path / "plots")
    return {"plots": plots}


def _folder(work: Study, name: str) -> Workdir:
    return Workdir(work.workdir.path / name)
