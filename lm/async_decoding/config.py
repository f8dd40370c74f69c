# SPDX-License-Identifier: Apache-2.0
"""The config of an async-decoding run: what every run has, and how its answers become rows."""

import dataclasses

from lm.async_decoding.positions import SCHEMES
from lm.async_decoding.requests import RequestConfig
from lm.config import Config, require_choice

STAGES = ("sft",)
FORMS = ("async", "plain")


@dataclasses.dataclass(frozen=True)
class ThreadConfig:
    """What is trained, and under which layout."""

    stage: str = "sft"
    form: str = "async"  # "async", or "plain": the same answers without tags, token after token
    positions: str = "predicted"  # a scheme of `lm.async_decoding.positions`
    recount: bool = True  # promise what blocks take under this run's tokenizer, rounded up to 10

    def __post_init__(self) -> None:
        require_choice("stage", self.stage, STAGES)
        require_choice("threads.form", self.form, FORMS)
        require_choice("threads.positions", self.positions, SCHEMES)


@dataclasses.dataclass(frozen=True)
class RunConfig(Config):
    """What config.json records. data.source "requests" are those of `lm.async_decoding.requests`,
    else a file of conversations whose answers may hold tags."""

    threads: ThreadConfig = ThreadConfig()
    requests: RequestConfig = RequestConfig()


@dataclasses.dataclass(frozen=True)
class AsyncConfig(RunConfig):
    """What commands take: `--config.stage` by itself, since it says which training this is.

    A record keeps it in `threads`: sections of one method are skipped by the others' commands.
    """

    stage: str = "sft"

    def run(self) -> RunConfig:
        """The config to run and record."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(RunConfig)}
        values["threads"] = dataclasses.replace(self.threads, stage=self.stage)
        return RunConfig(**values)
