# SPDX-License-Identifier: Apache-2.0
"""What studies of long contexts share: models are trained, methods compared and figures drawn in
calls of limited time, which go on where the last one stopped.

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
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from lm import hardware, prompting, setup, stages
from lm.config import Config, freeze, to_dict
from lm.errors import UserError
from lm.flops import training_flops
from lm.hf import weights
from lm.long_context import training
from lm.long_context.config import LongContextConfig
from lm.progress import say
from lm.prompting import Speaker
from lm.stages import Clock, OutOfTime
from lm.transformer import count_parameters
from lm.workdir import Workdir

C = TypeVar("C", bound=LongContextConfig)
_SHARE = 0.35  # of a chip's peak that the plan counts on
_FILE_BYTES = 15 << 20  # of weights in one file
_MADE = ("model", "data", "train", "optimizer")  # sections that make a model what it is


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
    workdir.create(config)
    workdir.record(config)
    study, found, name = Study(workdir, Clock(minutes)), None, stage
    for name in calls if stage == "all" else (stage,):
        try:
            found = calls[name](study)
        except OutOfTime:
            found = None
        say(f"{name}: {'to be continued by the same command' if found is None else 'done'}")
        if found is None:
            break
    return {"stage": name, "done": found is not None, **(found or {})}


def plan(configs: dict[str, LongContextConfig]) -> dict[str, float]:
    """Training FLOPs by name, from documents of `tasks.max_length` at most whose lengths are spread
    evenly; says them and, on a known chip, the minutes at 35 % of its peak."""
    found, chip = {}, hardware.chip()
    for name, config in configs.items():
        size = config.data.tokenizer.partition(":")[2]  # of bpe:SIZE; bytes have fewer than 384
        vocab = config.model.vocab_size or (int(size) if size.isdigit() else 384)
        model = dataclasses.replace(config.model, vocab_size=vocab)
        tokens = config.train.steps * config.train.batch_size * config.data.seq_len
        # a token sees half of a document, and long documents have more of them: 2 / 3 of the most
        found[name] = training_flops(model, tokens, tokens, tokens * config.tasks.max_length // 3)
        minutes = f", {found[name] / (_SHARE * chip.flops) / 60:.1f} minutes" if chip else ""
        say(
            f"plan: {name}, {count_parameters(model) / 1e6:.1f} M parameters, "
            f"{found[name] / 1e15:.2f} PFLOP{minutes}"
        )
    return found


def trained(
    study: Study,
    name: str,
    config: LongContextConfig,
    call: Callable[[], Any],
    folder: pathlib.Path,
) -> bool:
    """Whether the model is there, after training it with `call`, which works in `folder`, for what
    time is left.

    Raises UserError where a model of another config is there.
    """
    kept = study.weights(name)
    if (kept / "config.json").exists():
        _check(kept, config)
        return True
    if not stages.train(study.clock, call):
        return False
    _keep(Workdir(folder), kept)
    return True


def speaker(study: Study, name: str, cls: type[C]) -> Speaker:
    """A trained model. Raises UserError before it is there."""
    folder = study.weights(name)
    if not (folder / "config.json").exists():
        raise UserError(f"{study.workdir.path}: --stage=train comes first")
    config = freeze(_values(folder), cls)
    resolved = training.resolve(config, folder)
    _, params = weights.load(folder, dtype=resolved.model.dtype)
    return prompting.of_run(resolved, params)


def _keep(workdir: Workdir, folder: pathlib.Path) -> None:
    resolved, params = setup.load_workdir(workdir.path)
    folder.mkdir(parents=True, exist_ok=True)
    # before the weights: what has a config.json is whole
    for name, kept in (("config.json", "run.json"), ("metrics.jsonl", "metrics.jsonl")):
        shutil.copyfile(workdir.path / name, folder / kept)
    weights.save(
        folder,
        resolved.model,
        params,
        tokenizer=resolved.tokenizer,
        dtype=resolved.model.dtype,
        shard_bytes=_FILE_BYTES,
        overwrite=True,
    )


def _check(folder: pathlib.Path, config: LongContextConfig) -> None:
    before, now = _values(folder), json.loads(json.dumps(to_dict(config)))
    for section in _MADE:
        for key, value in now[section].items():
            known = before[section].get(key)
            if known != value:
                raise UserError(
                    f"{folder} was trained with {section}.{key}={known}, the config says {value}: "
                    "take another --workdir"
                )


def _values(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def metrics(study: Study, name: str) -> dict[str, Any]:
    """The last ones of a trained model: step, losses, rate."""
    return Workdir(study.weights(name)).rows("metrics.jsonl")[-1]
