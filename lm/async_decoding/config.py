# SPDX-License-Identifier: Apache-2.0
"""The config of an async-decoding run: what every run has, and how its answers become rows."""

import dataclasses

from lm.async_decoding.positions import DECODABLE, SCHEMES
from lm.async_decoding.requests import RequestConfig
from lm.config import Config, require_choice, require_positive
from lm.errors import UserError

STAGES = ("sft", "preference")
FORMS = ("async", "plain", "sot", "apar")
SPEEDS = ("critical_path", "parallelism")


@dataclasses.dataclass(frozen=True)
class ThreadConfig:
    """What is trained, and under which layout."""

    stage: str = "sft"
    # "async"; "plain": the same answers without tags, token after token; "sot", "apar": the
    # baselines of `lm.async_decoding.baselines`
    form: str = "async"
    positions: str = "predicted"  # a scheme of `lm.async_decoding.positions`
    recount: bool = True  # promise what blocks take under this run's tokenizer, rounded up to 10

    def __post_init__(self) -> None:
        require_choice("stage", self.stage, STAGES)
        require_choice("threads.form", self.form, FORMS)
        require_choice("threads.positions", self.positions, SCHEMES)


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Rounds of sampling and of preferring the best sample to the worst (arXiv 2502.11517, with the
    loss of BoNBoN, arXiv 2406.00832). A round takes train.epochs passes over its pairs, whatever
    train.steps says of SFT. What the paper leaves open is a choice made here: alpha, beta, the
    learning rate, and how long a round is; on the demo's model, a large alpha and a rate a
    thirtieth of SFT's kept the quality, other settings lost some of it.

    score = speed-up + quality_weight * quality, the latter in 0..1; infinite: quality first, then
    speed among those as good, the limit of large weights.
    """

    quality_weight: float = 2.0  # the paper's lambda: 1, 2, 4, 8, inf
    rounds: int = 2
    prompts: int = 512  # a round, taken from the training data
    samples: int = 10  # a prompt
    temperature: float = 1.0  # of the samples
    speed: str = "critical_path"  # or "parallelism": tokens per step of the answer itself
    alpha: float = 0.9  # of -log p(best); the rest weighs the squared gap
    beta: float = 1.0  # the gap that is aimed at is 1 / beta nats
    learning_rate: float = 1e-5  # in place of optimizer.learning_rate
    prompts_at_once: int = 8  # whose samples are decoded together
    threads: int = 8  # blocks that are written at once
    scorer: str = "requests"  # a name of `lm.async_decoding.quality.SCORERS`
    # a sequential run: its greedy answers' lengths are divided by; "" takes the data's own answers
    baseline: str = ""

    def __post_init__(self) -> None:
        require_choice("preference.speed", self.speed, SPEEDS)
        for name in ("rounds", "prompts", "prompts_at_once", "threads"):
            require_positive(f"preference.{name}", getattr(self, name))
        checks = {
            "samples must be at least 2: a best and a worst": self.samples >= 2,
            "quality_weight must be at least 0": self.quality_weight >= 0,
            "temperature must be above 0: samples must differ": self.temperature > 0,
            "alpha must lie in 0..1": 0 <= self.alpha <= 1,
            "beta must be above 0": self.beta > 0,
            "learning_rate must be above 0": self.learning_rate > 0,
        }
        for rule, holds in checks.items():
            if not holds:
                raise UserError(f"preference: {rule}")


@dataclasses.dataclass(frozen=True)
class RunConfig(Config):
    """What config.json records. data.source "requests" are those of `lm.async_decoding.requests`,
    else a file of conversations whose answers may hold tags."""

    threads: ThreadConfig = ThreadConfig()
    requests: RequestConfig = RequestConfig()
    preference: PreferenceConfig = PreferenceConfig()

    def __post_init__(self) -> None:
        if self.threads.stage == "preference":
            require_choice("threads.form", self.threads.form, ("async",))
            require_choice("threads.positions", self.threads.positions, DECODABLE)
            if not self.init_from:
                raise UserError("preference optimisation starts from a model: set init_from")


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
