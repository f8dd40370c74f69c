# SPDX-License-Identifier: Apache-2.0
"""Time of the threaded decoder beside sequential decoding of the same texts.

    python -m experiments.async_decoding.benchmark --config=configs/async_decoding.py:smoke
        [--checkpoint=DIR] [--batches=1,4] [--threads=1,8] [--answers=16] [--repeats=5]
        [--prompt_tokens=4096 --compose=none,evict:snapkv:512] [--workdir=DIR]
        [--prompt_tokens=4096 --compose=none,spec_kv:256 --draft=DIR|--draft_layers=2]
        [--prompt_tokens=4096 --compose=none,token_select:1024]
        [--compose=none,cp_heads --heads=DIR]

The work is given: the first --answers held-out answers of the config's data, tags and all, are
forced upon the decoder through its own steps, and their texts are decoded token after token in the
loop of `generate`. Without a checkpoint the config's shape is filled at random, which takes as
long. --threads are numbers of blocks that are written at a time. --prompt_tokens puts random tokens
before shorter prompts. --compose=evict:METHOD:TOKENS starts the threads from a prompt of which that
many tokens were kept, spec_kv:TOKENS from one that SpecKV thins: what --draft_tokens tokens of
--draft, or of the model's own first --draft_layers layers, attend to is kept, and the draft's time
is part of prefill. token_select:TOKENS reads the prompt whole and picks so many of its tokens in
every step, the --select_init first and --select_local last ones among them. cp_heads drafts in
every thread with the CP head of --heads; drafts are kept as far as they are the program's text.
--compose= and names that are unknown are refused with what there is.

Methods alternate and medians count. critical_path_speedup is steps of the text over steps of the
threads, wall_speedup the ratio of the times of the loops, realised the second over the first, each
a geometric mean over batches; step_ms are of steps that are started one by one, the other times of
whole loops; tokens_per_s is of the text as read. Rows go to benchmark.jsonl of --workdir, with
plots/benchmark.png. The last line is {"rows": [{"method": ..., "threads": n, "batch": n, "steps":
x, "critical_path_speedup": x, "wall_speedup": x, "realised": x, "step_ms_p50": x, "step_ms_p95": x,
"tokens_per_s": x, "peak_bytes": n, ...}, ...]}. Exit status 1 when a --require does not hold for
the last row.
"""

import dataclasses
import pathlib
from typing import Any

import jax
from absl import flags

from experiments import cli, compositions, gate
from experiments.async_decoding import compose_flags
from lm import prompting, transformer
from lm.async_decoding import benchmark, figures, language, runs, training
from lm.async_decoding.benchmark import Work
from lm.async_decoding.config import AsyncConfig, RunConfig
from lm.async_decoding.runs import Run
from lm.errors import UserError
from lm.workdir import Workdir

NAMES = ("critical_path_speedup", "wall_speedup", "realised")
DEFAULTS = benchmark.Options()

cli.define_config()
REQUIRE = gate.define(NAMES)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of a run")
WORKDIR = flags.DEFINE_string("workdir", None, "also append the rows to benchmark.jsonl there")
BATCHES = flags.DEFINE_list("batches", list(map(str, DEFAULTS.batches)), "answers at once")
THREADS = flags.DEFINE_list("threads", list(map(str, DEFAULTS.threads)), "blocks at once")
COMPOSE = flags.DEFINE_list("compose", list(DEFAULTS.compose), compose_flags.NAMES)
compose_flags.define()
ANSWERS = flags.DEFINE_integer("answers", 16, "of the data", lower_bound=1)
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 0, "at least, of a prompt", lower_bound=0)
REPEATS = flags.DEFINE_integer("repeats", DEFAULTS.repeats, "rounds over all methods")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "default: the config's or checkpoint's"
)
cli.define_implementation()


def main() -> dict[str, Any]:
    requirements = gate.parse(REQUIRE.value, NAMES)
    config = cli.config(AsyncConfig).run()
    options = benchmark.Options(  # refuses before anything is loaded
        batches=cli.numbers("batches", BATCHES.value),
        threads=cli.numbers("threads", THREADS.value),
        compose=tuple(COMPOSE.value),
        repeats=REPEATS.value,
        scheme=config.threads.positions,
        implementation=cli.implementation(),
    )
    parts = compose_flags.parts(COMPOSE.value)
    run, params = _model(config)
    if CHECKPOINT.value is not None:
        options = dataclasses.replace(options, scheme=run.config.threads.positions)
    speaker = prompting.of_run(run.setup, params, dtype=DTYPE.value)
    works = _works(config, run)
    if PROMPT_TOKENS.value:
        vocabulary = speaker.valid_vocab or speaker.model.vocab_size
        works = benchmark.lengthened(works, PROMPT_TOKENS.value, vocabulary, config.data.seed)
    record = _record(config)
    rows = benchmark.benchmark(speaker, works, options, compositions.makers(speaker, parts))
    result = {"rows": [record(row) for row in rows]}
    if WORKDIR.value is not None:
        folder = pathlib.Path(WORKDIR.value)
        drawn = figures.draw(figures.gather([folder]))
        figures.save(drawn, folder / "plots")
    failed = gate.failures(requirements, result["rows"][-1])
    if failed:
        raise cli.CheckFailed(result, "; ".join(failed))
    return result


def _model(config: RunConfig) -> tuple[Run, transformer.Params]:
    """The run of a checkpoint, or the config's with random parameters."""
    if CHECKPOINT.value is not None:
        return runs.load(pathlib.Path(CHECKPOINT.value))
    run = runs.resolve(config)
    if config.init_from:
        raise UserError("init_from is not timed: give --checkpoint, or random weights")
    return run, transformer.init(run.setup.model, jax.random.key(config.train.seed))


def _works(config: RunConfig, run: Run) -> list[Work]:
    """The first held-out answers. Raises UserError where there are none."""
    own = dataclasses.replace(run.config, data=config.data, threads=config.threads)
    asked = dataclasses.replace(run, setup=dataclasses.replace(run.setup, config=own))
    source = runs.conversations(config, "validation")
    works = []
    for example, program in training.decodable(asked, source):
        text = language.encode_prompt(language.render(example.program), run.setup.tokenizer)
        if len(text):  # nothing to time otherwise
            works.append(Work(program, len(text) + 1))
        if len(works) == ANSWERS.value:
            break
    if not works:
        raise UserError(f"{config.data.source} has no held-out answers")
    return works


def _record(config: RunConfig):
    """Completes a row and keeps it."""
    workdir = None
    if WORKDIR.value is not None:
        workdir = Workdir(WORKDIR.value)
        workdir.create(config)
        if not (workdir.path / "config.json").exists():  # a run keeps its own
            workdir.record(config)
    about = {
        "checkpoint": CHECKPOINT.value or "random",
        "source": config.data.source,
        "device": jax.devices()[0].device_kind,
    }

    def record(row: dict[str, Any]) -> dict[str, Any]:
        row = row | about
        if workdir is not None:
            workdir.append("benchmark.jsonl", row)
        return row

    return record


if __name__ == "__main__":
    cli.run(main)
