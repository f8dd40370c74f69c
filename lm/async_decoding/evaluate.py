# SPDX-License-Identifier: Apache-2.0
"""Quality and speed of trained runs on held-out questions, each beside the sequential baseline.

What a run answered is kept in evaluation/ of its workdir under a key of the weights, the questions
and the settings, question by question; a rerun takes it from there. Rows are made from that and
from the baseline's, so that another baseline needs no new answers.

Speed-up on the critical path: tokens of the baseline's answer over decoder steps of this one.
Speed-up on the wall: the ratio of the two decoding times, only at batch 1, where each question is
answered twice and the second time counts, so that nothing is compiled meanwhile. Both are geometric
means over questions. Intervals come from resampling the questions.
"""

import collections
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm import prompting, setup, tuned
from lm.async_decoding import (
    baselines,
    compositions,
    instructions,
    language,
    pairs,
    quality,
    runs,
)
from lm.async_decoding.answers import Answer
from lm.async_decoding.config import RunConfig
from lm.async_decoding.judge import Judge, Judgement, length_controlled
from lm.async_decoding.preference import MakeSampler, Sampler, weight_name
from lm.async_decoding.quality import Question
from lm.async_decoding.runs import Run
from lm.config import SamplingConfig, require_positive
from lm.errors import UserError
from lm.long_context import quality as intervals
from lm.progress import Progress, say
from lm.stages import UNLIMITED, Clock
from lm.transformer import Params
from lm.workdir import Workdir

KIND = "async"
THREADED = ("async", "apar")  # forms that the decoder writes
FOLDER = "evaluation"
_TIMELINES = 3  # answers whose threads are kept for a picture: those with the most


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure.

    batch_size: questions answered at once; only at 1 there are speed-ups on the wall.
    threads: blocks that are written at once.
    compose: a text of `compositions`, what the decoder is put together with; compose_parts: what it
      takes, as answers depend on it. Answers in a row, and SoT's, are written without.
    judge: says how often an answer beats the baseline's; judge_name tells its rows from others',
      judge_parts those of what had its name before.
    """

    scorer: str = "requests"
    batch_size: int = 1
    threads: int = 8
    seed: int = 0
    compose: str = compositions.NONE
    compose_parts: str = ""
    judge: Judge | None = None
    judge_name: str = ""
    judge_parts: Any = ""

    def __post_init__(self) -> None:
        require_positive("--batch_size", self.batch_size)
        require_positive("--threads", self.threads)
        quality.scorer(self.scorer)
        compositions.parse(self.compose)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one run did, by question."""

    key: str
    about: Mapping[str, Any]  # method, lambda, round, ...
    answers: Sequence[Mapping[str, Any]]
    timelines: Sequence[Mapping[str, Any]]

    def column(self, name: str) -> np.ndarray:
        return np.array([answer[name] for answer in self.answers], np.float64)


def run(
    config: RunConfig,
    paths: Sequence[pathlib.Path],
    make: MakeSampler,
    options: Options = Options(),
    baseline: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Measures runs and appends their rows to each one's eval.jsonl, once.

    make: decodes what knows the language; baselines decode themselves, sequential runs in the loop
      of `lm.generate`, which does nothing else.
    baseline: a sequential run, by default the first of `paths` that is one.

    Raises UserError and DataError.
    """
    if jax.process_count() > 1:
        raise UserError("evaluate runs on one process")
    if not paths:
        raise UserError("which checkpoint? give at least one")
    first = baseline or next((path for path in paths if form_of(path) == "plain"), None)
    if first is not None and form_of(first) != "plain":
        raise UserError(f"--baseline={first}: no run that writes in a row (threads.form=plain)")
    if first is None and options.judge is not None:
        raise UserError("--judge compares with a sequential run: name one as --baseline")
    if first is None:
        say("no sequential run among the checkpoints: no speed-ups (--baseline names one)")
    asked = questions(config, [*paths, *filter(None, [first])])
    against = None if first is None else measure(first, config, asked, make, options)
    rows = []
    for path in dict.fromkeys(paths):
        found = against if path == first else measure(path, config, asked, make, options)
        row = row_of(found, against, asked, options) | {
            "source": config.data.source,
            "checkpoint": str(path),
        }
        rows.append(row)
        workdir = Workdir(path)
        known = [one for one in workdir.rows("eval.jsonl") if one.get("kind") == KIND]
        if not any(one["key"] == row["key"] for one in known):
            workdir.append("eval.jsonl", row)
    return {"rows": rows}


def form_of(path: pathlib.Path) -> str:
    """The form of answers that a run was trained on. Raises UserError."""
    return runs.config_at(path).threads.form


def questions(config: RunConfig, paths: Sequence[pathlib.Path]) -> list[Question]:
    """What is asked: of a source that any of the runs was trained on only what was held out, of any
    other file everything, up to data.eval_conversations.

    Raises UserError and DataError; UserError also where a run held out another part of the source.
    """
    data = config.data
    if data.source == "requests":
        return quality.questions(runs.conversations(config, "validation"))
    trained = [runs.config_at(path).data for path in dict.fromkeys(paths)]
    split, data = setup.split_of(trained, data)
    if split == "validation":
        config = dataclasses.replace(config, data=data)
        return quality.questions(runs.conversations(config, "validation"))
    reader = instructions.read(data.source, on_error=data.on_error, limit=data.eval_conversations)
    return quality.questions(list(reader))


# --- answers


def sampler_of(run: Run, params: Params, make: MakeSampler, sampling: SamplingConfig) -> Sampler:
    """What answers for a run, by the form that it was trained on."""
    known = {"plain": baselines.plain_answers, "sot": baselines.sot_answers}
    own = known.get(run.config.threads.form)
    if own is None:
        return make(run, params, sampling.temperature)
    speaker = prompting.of_run(run.setup, params)
    return lambda prompts, seed: own(speaker, prompts, sampling, seed)


def measure(
    path: pathlib.Path,
    config: RunConfig,
    asked: Sequence[Question],
    make: MakeSampler,
    options: Options,
    clock: Clock = UNLIMITED,
    workdir: Workdir | None = None,
) -> Measured:
    """The answers of a run, from a workdir where they are there.

    path: a workdir, or what `lm.studies` kept of one.
    workdir: where answers are kept; None: `path`.

    Raises UserError, and OutOfTime of the clock with what was answered kept.
    """
    loaded, params = runs.load(path)
    key = _key(loaded, params, config, asked, options)
    workdir = workdir or Workdir(path)
    found = kept(workdir, key)
    if found is not None:
        say(f"{path}: answered before")
        return found
    (workdir.path / FOLDER).mkdir(parents=True, exist_ok=True)
    sampler, partial = sampler_of(loaded, params, make, config.sampling), f"{FOLDER}/{key}.jsonl"
    done = workdir.rows(partial)
    done = done[: len(done) // options.batch_size * options.batch_size]
    # a line that a kill cut short is written again
    workdir.write(partial, "".join(json.dumps(row) + "\n" for row in done))
    with Progress(str(path), len(asked), len(done)) as progress:
        for first in range(len(done), len(asked), options.batch_size):
            clock.check()
            group = asked[first : first + options.batch_size]
            answers = _answers(sampler, group, first, options)
            for question, answer in zip(group, answers, strict=True):
                record = record_of(question, answer, loaded, options.scorer)
                workdir.append(partial, {"answer": record, "timeline": timeline(answer, loaded)})
            progress.advance(len(group))
    done = workdir.rows(partial)
    most = sorted((row["timeline"] for row in done), key=lambda one: -len(one["threads"]))
    found = Measured(key, about(loaded, path), [row["answer"] for row in done], most[:_TIMELINES])
    workdir.write(f"{FOLDER}/{key}.json", json.dumps(dataclasses.asdict(found)) + "\n")
    (workdir.path / partial).unlink()
    return found


def kept(workdir: Workdir, key: str = "*") -> Measured | None:
    """What was measured under a key, by default any; None where nothing was."""
    files = sorted((workdir.path / FOLDER).glob(f"{key}.json"), key=lambda f: f.stat().st_mtime)
    return Measured(**json.loads(files[-1].read_text())) if files else None


def record_of(question: Question, answer: Answer, loaded: Run, scorer: str) -> dict[str, Any]:
    """What is kept of an answer."""
    tokenizer = loaded.setup.tokenizer
    return {
        "prompt": question.prompt,
        "quality": quality.scorer(scorer)(question, answer.assembly),
        "consistency": quality.consistency(answer.assembly),
        "text": answer.text,
        "decoded": answer.decoded,
        "steps": max(answer.steps, 1),
        "seconds": answer.seconds,
        "finished": answer.finished,
        "well_formed": loaded.config.threads.form != "async"
        or pairs.well_formed(answer, tokenizer, tokenizer.stop_ids),
        "warnings": dict(answer.assembly.warnings),
    }


def _key(
    loaded: Run, params: Params, config: RunConfig, asked: Sequence[Question], options: Options
) -> str:
    """What answers and their scores depend on."""
    form = loaded.config.threads.form
    parts = {
        "policy": tuned.digest(params),
        # answers under "apar" have a time since they are written in threads
        "form": {"apar": "apar in threads"}.get(form, form),
        "positions": loaded.config.threads.positions,
        "questions": [dataclasses.astuple(question) for question in asked],
        "sampling": dataclasses.asdict(config.sampling),
        "scorer": options.scorer,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "seed": options.seed,
    }
    if _composed(options, form):
        parts["compose"] = [options.compose, options.compose_parts]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _composed(options: Options, form: str) -> bool:
    return options.compose != compositions.NONE and form in THREADED


def _answers(
    sampler: Sampler, group: Sequence[Question], first: int, options: Options
) -> list[Answer]:
    """To the questions of a batch, from number `first` on."""
    prompts = [one.prompt for one in group]
    found = sampler(prompts, options.seed + first)
    return sampler(prompts, options.seed + first) if options.batch_size == 1 else found


def about(loaded: Run, path: pathlib.Path) -> dict[str, Any]:
    """What a run is called in rows."""
    threads = loaded.config.threads
    method = {"async": f"async {threads.positions}", "plain": "sequential"}.get(threads.form)
    preferred = threads.stage == "preference"
    newest = runs.newest(path).name.removeprefix(runs.ROUND)
    return {
        "method": method or threads.form,
        "form": threads.form,
        "positions": threads.positions if threads.form == "async" else None,
        "stage": threads.stage,
        "lambda": weight_name(loaded.config.preference.quality_weight) if preferred else None,
        "round": int(newest) if preferred and newest.isdigit() else None,
    }


def timeline(answer: Answer, loaded: Run) -> dict[str, Any]:
    """When each thread of an answer put out tokens: runs of steps [first, last], and how many steps
    its opening took before."""
    threads = []
    for number, thread in enumerate(answer.threads):
        steps = thread.steps.tolist()
        spans: list[list[int]] = []
        for step in steps:
            if spans and step == spans[-1][1] + 1:
                spans[-1][1] = step
            else:
                spans.append([step, step])
        opening = loaded.setup.tokenizer.decode(thread.ids[: thread.forced].tolist())
        topic = opening.removeprefix(language.ASYNC).removesuffix(language.ASYNC_BODY)
        threads.append(
            {
                "label": "main" if not number else topic or f"block {number}",
                "opening": thread.forced,
                "spans": spans,
            }
        )
    return {"prompt": answer.prompt, "steps": answer.steps, "threads": threads}


# --- rows


def row_of(
    found: Measured, against: Measured | None, asked: Sequence[Question], options: Options
) -> dict[str, Any]:
    """A row of one run; speed-ups and the difference in quality are over the baseline."""
    warnings: collections.Counter[str] = collections.Counter()
    for answer in found.answers:
        warnings.update(answer["warnings"])
    composes = _composed(options, found.about["form"])
    row: dict[str, Any] = {
        "kind": KIND,
        **found.about,
        **_mean("quality", found.column("quality")),
        "speedup_critical_path": None,
        "speedup_wall": None,
    }
    if against is not None:
        row |= _speeds(found, against, options)
        apart = intervals.difference(found.column("quality"), against.column("quality"))
        row |= {"quality_difference": apart.mean, "quality_difference_ci95": list(apart.ci95)}
        if options.judge is not None and found is not against:
            row |= _win_rate(found, against, asked, options)
    steps, decoded = found.column("steps"), found.column("decoded")
    return row | {
        "parallelism": float(np.mean(decoded / steps)),
        "tokens": float(decoded.mean()),
        "steps": float(steps.mean()),
        "consistency": float(found.column("consistency").mean()),
        "well_formed": float(found.column("well_formed").mean()),
        "finished": float(found.column("finished").mean()),
        "warnings": dict(warnings),
        "n": len(found.answers),
        "batch": options.batch_size,
        "scorer": options.scorer,
        "seed": options.seed,
        "compose": options.compose if composes else compositions.NONE,
        "key": "-".join([found.key, *([] if against is None else [against.key]),
                         *([_judge_key(options)] if options.judge else [])]),
    }  # fmt: skip


def _judge_key(options: Options) -> str:
    if not options.judge_parts:
        return options.judge_name
    parts = json.dumps(options.judge_parts).encode()
    return f"{options.judge_name} {hashlib.sha256(parts).hexdigest()[:12]}"


def _mean(name: str, values: np.ndarray) -> dict[str, Any]:
    drawn = intervals.difference(values, np.zeros_like(values))
    return {name: drawn.mean, f"{name}_ci95": list(drawn.ci95)}


def _speeds(found: Measured, against: Measured, options: Options) -> dict[str, Any]:
    """Geometric means with intervals, and how much of the critical path's gain is realised."""
    ratios = {
        "speedup_critical_path": against.column("decoded") / found.column("steps"),
    }
    times = [[one["seconds"] for one in which.answers] for which in (against, found)]
    if options.batch_size == 1 and all(second for second in (*times[0], *times[1])):
        ratios["speedup_wall"] = np.array(times[0]) / np.array(times[1])
    out: dict[str, Any] = {}
    for name, values in ratios.items():
        drawn = _mean(name, np.log(values))
        out[name] = math.exp(drawn[name])
        out[f"{name}_ci95"] = [math.exp(value) for value in drawn[f"{name}_ci95"]]
    if "speedup_wall" in out:
        out["realised"] = out["speedup_wall"] / out["speedup_critical_path"]
    return out


def _win_rate(
    found: Measured, against: Measured, asked: Sequence[Question], options: Options
) -> dict[str, Any]:
    """How often the judge prefers these answers to the baseline's, plain and length-controlled."""
    texts = [
        (question.prompt, base["text"], own["text"])
        for question, base, own in zip(asked, against.answers, found.answers, strict=True)
    ]
    shares = options.judge(texts)
    rate = length_controlled(
        [
            Judgement(share, len(base), len(own))
            for share, (_, base, own) in zip(shares, texts, strict=True)
        ]
    )
    return {
        "judge": options.judge_name,
        "win_rate": rate.plain,
        "win_rate_length_controlled": rate.length_controlled,
    }


def export(
    paths: Sequence[pathlib.Path], rows: Sequence[Mapping[str, Any]], file: pathlib.Path
) -> int:
    """Writes the answers behind rows as AlpacaEval's list of outputs (instruction, output,
    generator); returns how many. Raises UserError when the file cannot be written."""
    out = []
    for path, row in zip(paths, rows, strict=True):
        kept = Workdir(path).path / FOLDER / f"{row['key'].partition('-')[0]}.json"
        found = json.loads(kept.read_text())
        name = row["method"] if row["lambda"] is None else f"{row['method']} lambda={row['lambda']}"
        out += [
            {"instruction": one["prompt"], "output": one["text"], "generator": name}
            for one in found["answers"]
        ]
    try:
        file.write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    return len(out)
