# SPDX-License-Identifier: Apache-2.0
"""What studies share: models are trained and measured, stage after stage, in calls of limited time,
which go on where the last one stopped.

| folder | what lies there |
|---|---|
| runs/ | the runs of models, with checkpoints: of no use once it has ended |
| weights/NAME | what is kept of it: weights in the compute dtype, tokenizer, config, metrics |

Files of weights are small enough to be carried from one machine to another; from them alone rows
are measured, so that a model need not be trained again when the machine it was made on is gone.
"""

import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from lm import hardware, setup, stages
from lm.config import Config, freeze, to_dict
from lm.errors import UserError
from lm.flops import training_flops
from lm.hf import families, weights
from lm.progress import say
from lm.stages import Clock, OutOfTime
from lm.transformer import count_parameters
from lm.workdir import Workdir

C = TypeVar("C", bound=Config)
RUN = "run.json"  # of kept weights: the config of their run; config.json is that of the weights
MADE = ("model", "data", "train", "optimizer")  # sections that make a model what it is
MADE_OF_TASKS = (*MADE, "tasks")
_SHARE = 0.35  # of a chip's peak that a plan counts on
_FILE_BYTES = 15 << 20  # of weights in one file


@dataclasses.dataclass(frozen=True)
class Study:
    """Where a study works, and until when."""

    workdir: Workdir
    clock: Clock

    @property
    def runs(self) -> pathlib.Path:
        return self.workdir.path / "runs"

    def weights(self, name: str) -> pathlib.Path:
        return self.workdir.path / "weights" / name

    def has(self, name: str) -> bool:
        """Whether the weights of a model are there, whole."""
        return (self.weights(name) / "config.json").exists()


def run(
    config: Config,
    workdir: Workdir,
    calls: dict[str, Callable[[Study], dict[str, Any] | None]],
    stage: str = "all",
    minutes: float | None = None,
) -> dict[str, Any]:
    """Runs a stage, or all of them, for at most `minutes`.

    calls: by stage what runs it and gives what it found, None where it is to be continued;
      OutOfTime says the same.

    Returns `stage` (the last that ran), `done`, and what it found. Raises UserError.
    """
    if jax.process_count() > 1:
        raise UserError("a study runs on one process")
    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes={minutes} must be above 0")
    workdir.refuse_run()
    workdir.create(config)
    workdir.record(config)
    study, found, name = Study(workdir, Clock(minutes)), None, stage
    for name in calls if stage == "all" else (stage,):
        began = time.monotonic()
        try:
            found = calls[name](study)
        except OutOfTime:
            found = None
        how = "to be continued by the same command" if found is None else "done"
        say(f"{name}: {how}, {time.monotonic() - began:.0f} s")
        if found is None:
            break
    return {"stage": name, "done": found is not None, **(found or {})}


def plan(name: str, config: Config, pairs: float) -> float:
    """Training FLOPs of a run of `train.steps`; says them and, on a known chip, the minutes at 35 %
    of its peak.

    pairs: (row, key) pairs of attention that a token comes to, on average.
    """
    model = sized(config).model
    tokens = config.train.steps * config.train.batch_size * config.data.seq_len
    flops = training_flops(model, tokens, tokens, tokens * pairs)
    say_plan(f"{name}, {count_parameters(model) / 1e6:.1f} M parameters,", flops)
    return flops


def sized(config: C) -> C:
    """With the vocabulary that its tokenizer's name tells, where the model says none."""
    size = config.data.tokenizer.partition(":")[2]  # of bpe:SIZE; bytes have fewer than 384
    vocab = config.model.vocab_size or (int(size) if size.isdigit() else 384)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab))


def say_plan(name: str, flops: float) -> None:
    """What a training costs, and on a known chip the minutes at 35 % of its peak."""
    chip = hardware.chip()
    minutes = f", {flops / (_SHARE * chip.flops) / 60:.1f} minutes" if chip else ""
    say(f"plan: {name} {flops / 1e15:.2f} PFLOP{minutes}")


def trained(
    study: Study,
    name: str,
    config: Config,
    call: Callable[[], Any],
    folder: pathlib.Path,
    made: Sequence[str] = MADE,
) -> bool:
    """Whether the model is there, after training it with `call`, which works in `folder`, for what
    time is left.

    made: the sections of the config that make it what it is, what is only asked of it
      (`eval_...`) aside.

    Raises UserError where a model of another config is there, or for a model that no weights could
    be kept of, and OutOfTime as `call` does.
    """
    if study.has(name):
        _check(study.weights(name), config, made)
        return True
    if not config.init_from:
        families.of_model(sized(config).model)  # or the weights could not be kept
    if not stages.train(study.clock, call):
        return False
    keep(folder, study.weights(name))
    return True


def keep(run: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the newest weights of a workdir to a folder, in the compute dtype."""
    resolved, params = setup.load_workdir(run)
    folder.mkdir(parents=True, exist_ok=True)
    # before the weights: what has a config.json is whole
    for name, kept in (("config.json", RUN), ("metrics.jsonl", "metrics.jsonl")):
        shutil.copyfile(run / name, folder / kept)
    weights.save(
        folder,
        resolved.model,
        params,
        tokenizer=resolved.tokenizer,
        dtype=resolved.model.dtype,
        shard_bytes=_FILE_BYTES,
        overwrite=True,
    )


def _check(folder: pathlib.Path, config: Config, made: Sequence[str]) -> None:
    before, now = _values(folder), json.loads(json.dumps(to_dict(config)))
    for section in made:
        for key, value in now[section].items():
            known = before[section].get(key)
            if known != value and not key.startswith("eval_"):
                raise UserError(
                    f"{folder} was trained with {section}.{key}={known}, the config says {value}: "
                    "take another --workdir"
                )


def config_of(folder: pathlib.Path, cls: type[C]) -> C:
    """The config of the run that kept weights come from, without sections that `cls` has not: a
    model may go from one method's study to another's."""
    known = {field.name for field in dataclasses.fields(cls)}
    return freeze({name: x for name, x in _values(folder).items() if name in known}, cls)


def _values(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / RUN).read_text())


def metrics(study: Study, name: str) -> dict[str, Any]:
    """The last ones of a trained model: step, losses, rate."""
    return Workdir(study.weights(name)).rows("metrics.jsonl")[-1]
