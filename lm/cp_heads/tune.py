# SPDX-License-Identifier: Apache-2.0
"""Chooses how many tokens to draft, the rank and the transition on the user's data and device.

Expected tokens per call (`lm.cp_heads.offline`) orders the candidates, and the most promising ones
are then timed: a higher rank accepts more and costs more, and only the device knows which wins. A
head of P factors is a head of any smaller number, so one trained head gives many candidates.
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm import generate, setup, transformer, tuned
from lm.config import SamplingConfig, require_choice, require_positive
from lm.cp_heads import checkpoints, decode, drafters, evaluate, prompts, training
from lm.cp_heads.checkpoints import Loaded
from lm.cp_heads.config import CpConfig
from lm.cp_heads.head import TRANSITIONS, HeadConfig, HeadParams
from lm.errors import RunError, UserError
from lm.progress import Progress, say
from lm.workdir import Workdir

_COMMAND = "experiments.cp_heads.tune"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is tried, and how it is timed.

    ranks, transitions: heads to train on the trunk before they are compared; () only compares.
    timed: candidates that are timed, the best of each head first.
    sequences: decoded one after the other, each of `batch` prompts at once.
    """

    ranks: tuple[int, ...] = ()
    transitions: tuple[str, ...] = ("identity", "constant")
    timed: int = 6
    sequences: int = 4
    batch: int = 1
    repeats: int = 3
    texts: evaluate.Options = evaluate.Options()

    def __post_init__(self):
        for rank in self.ranks:
            require_positive("--ranks", rank)
        for transition in self.transitions:
            require_choice("--transitions", transition, TRANSITIONS)
        for name in ("timed", "sequences", "batch", "repeats"):
            require_positive(f"--{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was chosen, and for what."""

    checkpoint: str  # "": plain decoding was fastest
    rank: int
    transition: str
    n: int
    tokens_per_s: float
    speedup: float  # over plain decoding, same run
    hashes: dict[str, str]  # of model, tokenizer and template

    def differences(self, now: Mapping[str, str]) -> list[str]:
        """Which of model, tokenizer and template are not those that this was tuned for."""
        return tuned.differences(self.hashes, now)


def hashes_of(resolved: setup.Setup, params: transformer.Params) -> dict[str, str]:
    """Of a run's setup: what a choice depends on."""
    return tuned.hashes(params, resolved.tokenizer, resolved.template)


def load(path: pathlib.Path) -> Tuned:
    """The choice in a file, or in tuned.json of a workdir. Raises UserError."""
    names = [field.name for field in dataclasses.fields(Tuned)]
    fields = tuned.read(path, _COMMAND, names)
    return Tuned(**{name: fields[name] for name in names})


def checkpoint_of(choice: Tuned) -> pathlib.Path:
    """The head that was chosen. Raises UserError where plain decoding was."""
    if not choice.checkpoint:
        raise UserError(
            "tuned: plain decoding was fastest, no head was chosen; name a --checkpoint"
        )
    return pathlib.Path(choice.checkpoint)


def fitted(
    choice: Tuned, config: HeadConfig, head: HeadParams, now: Mapping[str, str]
) -> tuple[HeadConfig, HeadParams]:
    """The head as it was chosen; says so where it was tuned for something else.

    Args:
      now: `lm.tuned.hashes` of what it is used with.

    Raises UserError when the head has another rank or transition, or fewer factors.
    """
    if (config.rank, config.transition) != (choice.rank, choice.transition) or (
        config.predicted < choice.n
    ):
        raise UserError(
            f"tuned for a head of rank {choice.rank}, {choice.transition}, n={choice.n}; this one "
            f"has rank {config.rank}, {config.transition}, n={config.predicted}"
        )
    tuned.report(choice.hashes, now)
    return shortened(config, head, choice.n)


def apply(choice: Tuned, loaded: Loaded) -> Loaded:
    """`fitted` for a checkpoint."""
    now = hashes_of(loaded.setup, loaded.params)
    config, head = fitted(choice, loaded.head_config, loaded.head, now)
    return dataclasses.replace(loaded, head_config=config, head=head)


def shortened(
    config: HeadConfig, params: HeadParams, predicted: int
) -> tuple[HeadConfig, HeadParams]:
    """The first `predicted` factors of a head: a head by itself. Raises ValueError beyond P."""
    if not 1 <= predicted <= config.predicted:
        raise ValueError(f"{predicted} factors of a head that has {config.predicted}")
    out = dict(params)
    out["expander"] = {name: leaf[:predicted] for name, leaf in params["expander"].items()}
    if "transition" in params:
        kept = {name: leaf[: predicted - 1] for name, leaf in params["transition"].items()}
        out["transition"] = kept
    return dataclasses.replace(config, predicted=predicted), out


def run(
    config: CpConfig, workdir: Workdir, paths: Sequence[pathlib.Path], options: Options = Options()
) -> dict[str, Any]:
    """Trains what is missing, compares, times and writes tuned.json into the workdir.

    paths: trained heads; with `options.ranks` the first one is the trunk that heads are trained on,
      for `train.steps` each, in WORKDIR/heads.

    Raises UserError, DataError and RunError.
    """
    workdir.create(config)
    workdir.record(config)
    paths = [*paths] if not options.ranks else _trained(config, workdir, paths, options)
    found = evaluate.run(config, paths, options.texts)["rows"]
    chosen = candidates(found, options.timed)
    rows: list[dict[str, Any]] = []
    made_for: dict[str, dict[str, str]] = {}
    with Progress("time", len(chosen) + 1) as progress:
        for row in chosen:
            loaded = checkpoints.load(pathlib.Path(row["checkpoint"]), config)
            params = generate.cast(loaded.model, loaded.params)
            texts = _prompts(loaded, config, options)
            sampling = dataclasses.replace(config.sampling, temperature=row["temperature"])
            made_for[row["checkpoint"]] = hashes_of(loaded.setup, params)
            if not rows:
                made_for[""] = made_for[row["checkpoint"]]
                plain = measure(loaded, params, 0, texts, sampling, options)
                rows.append({"kind": "tune", "method": "autoregressive", **plain})
                progress.advance()
            timed = measure(loaded, params, row["n"], texts, sampling, options)
            rows.append({**row, "kind": "tune", **timed})
            progress.advance()
    for row in rows:
        row["speedup"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        workdir.append("benchmark.jsonl", row)
    best = max(rows, key=lambda row: row["tokens_per_s"])
    choice = Tuned(
        checkpoint=best.get("checkpoint", ""),
        rank=best.get("rank", 0),
        transition=best.get("transition", ""),
        n=best.get("n", 1),
        tokens_per_s=best["tokens_per_s"],
        speedup=best["speedup"],
        hashes=made_for[best.get("checkpoint", "")],
    )
    chosen = dataclasses.asdict(choice)
    tuned.write(workdir, chosen, rows)
    return {"chosen": chosen, "rows": rows}


def candidates(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The best length of every head, then the best of what is left, `count` in all."""
    ordered = sorted(rows, key=lambda row: row["expected_tokens_per_call"] or 0, reverse=True)
    first: dict[str, dict[str, Any]] = {}
    for row in ordered:
        first.setdefault(row["checkpoint"], row)
    rest = [row for row in ordered if row not in first.values()]
    return [*first.values(), *rest][:count]


def measure(
    loaded: Loaded,
    params: transformer.Params,  # in the compute dtype
    predicted: int,  # 0: plain decoding
    texts: Sequence[np.ndarray],
    sampling: SamplingConfig,
    options: Options,
) -> dict[str, Any]:
    """Tokens per second and per trunk call, compilation excluded; the median of the repeats."""
    target = drafters.Target(
        loaded.model,
        sampling,
        implementation=options.texts.implementation,
        valid_vocab=loaded.setup.valid_vocab,
    )
    drafter, head = drafters.Autoregressive(), {}
    if predicted:
        config, head = shortened(loaded.head_config, loaded.head, predicted)
        drafter = drafters.Heads(config)
    batches = [texts[i : i + options.batch] for i in range(0, len(texts), options.batch)]

    def once() -> decode.Statistics:
        parts = [
            decode.decode(
                target,
                params,
                drafter,
                head,
                batch,
                loaded.setup.tokenizer.stop_ids,
                jax.random.key(options.texts.seed),
                indices=range(index * options.batch, index * options.batch + len(batch)),
            )[1]
            for index, batch in enumerate(batches)
        ]
        return sum(parts[1:], parts[0])

    counted = once()  # compiles
    seconds = []
    for _ in range(options.repeats):
        began = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - began)
    tokens = int(np.sum(counted.tokens))
    if not tokens:
        raise RunError("nothing was generated to time: the model stops at once on these prompts")
    return {
        "tokens_per_s": tokens / statistics.median(seconds),
        "tokens_per_call": counted.summary()["tokens_per_call"],
        "batch": options.batch,
        "tokens": tokens,
        "temperature": sampling.temperature,
    }


def _prompts(loaded: Loaded, config: CpConfig, options: Options) -> list[np.ndarray]:
    """Beginnings of held-out texts of the config's data, as the model's tokenizer reads them."""
    own = dataclasses.replace(loaded.setup.config, data=evaluate.data_of(loaded, config))
    resolved = dataclasses.replace(loaded.setup, config=own)
    count = options.sequences * options.batch
    return prompts.held_out(resolved, options.texts.prompt_tokens, count)


def _trained(
    config: CpConfig, workdir: Workdir, paths: Sequence[pathlib.Path], options: Options
) -> list[pathlib.Path]:
    """Heads of every rank and transition on the trunk, trained unless they are there already."""
    if len(paths) != 1:
        raise UserError("--ranks trains heads on one trunk: give one --checkpoint")
    made = []
    for rank in options.ranks:
        for transition in options.transitions if rank > 1 else ("identity",):
            own = dataclasses.replace(config.head, rank=rank, transition=transition)
            folder = workdir.path / "heads" / evaluate.name_of(own).replace(" ", "_")
            say(f"training {folder.name}")
            loss = dataclasses.replace(config.loss, mode="heads")
            data = dataclasses.replace(config.data, tokenizer="auto")  # the trunk's
            one = dataclasses.replace(config, head=own, loss=loss, data=data)
            one = dataclasses.replace(one, init_from=str(paths[0]))
            training.run(one, Workdir(folder))
            made.append(folder)
    return made
