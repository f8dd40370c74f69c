# SPDX-License-Identifier: Apache-2.0
"""What studies of long contexts (`lm.studies`) share: what training costs, and models that speak
from the weights that were kept."""

from typing import TypeVar

from lm import prompting, studies
from lm.errors import UserError
from lm.hf import weights
from lm.long_context import training
from lm.long_context.config import LongContextConfig
from lm.prompting import Speaker
from lm.studies import Study

C = TypeVar("C", bound=LongContextConfig)


def plan(configs: dict[str, LongContextConfig]) -> dict[str, float]:
    """Training FLOPs by name, from documents of `tasks.max_length` at most whose lengths are spread
    evenly; says them and, on a known chip, the minutes at 35 % of its peak."""
    # a token sees half of a document, and long documents have more of them: 2 / 3 of the most
    return {
        name: studies.plan(name, config, config.tasks.max_length // 3)
        for name, config in configs.items()
    }


def speaker(study: Study, name: str, cls: type[C]) -> Speaker:
    """A trained model. Raises UserError before it is there."""
    folder = study.weights(name)
    if not study.has(name):
        raise UserError(f"{study.workdir.path}: --stage=train comes first")
    resolved = training.resolve(studies.config_of(folder, cls), folder)
    _, params = weights.load(folder, dtype=resolved.model.dtype)
    return prompting.of_run(resolved, params)
