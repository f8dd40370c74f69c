# SPDX-License-Identifier: Apache-2.0
"""Flags that commands on long contexts share, and what they say: questions, comparisons, studies,
benchmarks, prompts.

A command calls the `define_` functions of what it takes and reads the flags through `options`,
`timing`, `text` or `kept`.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import cli
from lm.config import Config
from lm.errors import UserError
from lm.long_context import benchmark
from lm.long_context.options import Options
from lm.workdir import Workdir

_DEFAULTS, _TIMES = Options(), benchmark.Options()
_QUESTIONS = ("samples", "data", "max_new_tokens", "capacity", "chat", "batch_size")
_RUNNING = ("dtype", "implementation")


def define_running(default: str = "the checkpoint's") -> None:
    """--dtype and --implementation; default: which dtype there is without."""
    names = ["float32", "bfloat16", "float16"]
    flags.DEFINE_enum("dtype", None, names, f"default: {default}")
    cli.define_implementation("of every op, or a refusal (default: for each the first that serves)")


def define_questions() -> None:
    """What is asked: tasks by length, or a file."""
    flags.DEFINE_list("tasks", [], "default: tasks.names of the config")
    flags.DEFINE_list("lengths", [], "tokens of a context (default: tasks.eval_lengths)")
    flags.DEFINE_integer("samples", 0, "of each task and length (default: eval_samples)")
    flags.DEFINE_string("data", "", "prompts in place of tasks: JSONL, or a line each")
    flags.DEFINE_integer("max_new_tokens", _DEFAULTS.max_new_tokens, "with --data")
    flags.DEFINE_integer("capacity", None, "context in tokens, with --data", lower_bound=1)
    about = "through the chat template (default: a model of Hugging Face)"
    flags.DEFINE_bool("chat", None, about)
    flags.DEFINE_integer("batch_size", _DEFAULTS.batch_size, "prompts at once")
    define_running()


def define_comparison(
    methods: Sequence[str], about: str, seeds: Sequence[str], of: str = ""
) -> None:
    """Questions, and the methods that are compared on them.

    about: of --methods; of: of --seeds.
    """
    define_questions()
    flags.DEFINE_string("workdir", None, "where rows are kept (default: the checkpoint's run)")
    flags.DEFINE_list("methods", list(methods), about)
    flags.DEFINE_list("budgets", [], "tokens, 5%, k=256 or k=5% (default: the config's)")
    flags.DEFINE_list("seeds", list(seeds), f"of the samples, rows for each{of}")
    flags.DEFINE_bool("timed", None, "measure latency as well (default: with --data)")
    flags.DEFINE_string("tuned", "", "workdir of tune, or its tuned.json: its settings")


def options(names: Sequence[str] = (), **others: Any) -> Options:
    """What `define_questions` took, with `names` of further flags as they are, and `others`."""
    found = {name: cli.FLAGS[name].value for name in (*_QUESTIONS, *_RUNNING, *names)}
    tasks, lengths = tuple(cli.FLAGS.tasks), cli.numbers("lengths", cli.FLAGS.lengths)
    return Options(tasks=tasks, lengths=lengths, **found, **others)


def comparison(seeds: Sequence[int] = (), **others: Any) -> Options:
    """What `define_comparison` took; seeds: where none are named."""
    flag = cli.FLAGS
    return options(
        ("timed", "tuned"),
        methods=tuple(flag.methods),
        budgets=tuple(flag.budgets),
        seeds=cli.numbers("seeds", flag.seeds) or tuple(seeds),
        **others,
    )


def define_study(stages: Sequence[str], seeds: Sequence[str]) -> None:
    """Stages, their time, and what is compared in them."""
    flags.DEFINE_enum("stage", "all", [*stages, "all"], "what to run")
    flags.DEFINE_float("minutes", None, "stop after so long, saved; default: no limit")
    flags.DEFINE_bool("plan", False, "only say what the training costs")
    flags.DEFINE_list("methods", [], "default: the usual ones, the main ones first")
    flags.DEFINE_list("budgets", [], "tokens, 5%, k=256 or k=5% (default: the config's)")
    flags.DEFINE_list("tasks", [], "default: tasks.names of the config")
    flags.DEFINE_list("lengths", [], "tokens of a context (default: tasks.eval_lengths)")
    flags.DEFINE_integer("samples", 0, "of each task and length (default: eval_samples)")
    flags.DEFINE_list("seeds", list(seeds), "of the samples, rows for each")
    flags.DEFINE_integer("batch_size", 128, "prompts at once")


def studied(seeds: Sequence[int] = ()) -> Options:
    """What `define_study` took; seeds: where none are named."""
    flag = cli.FLAGS
    return Options(
        methods=tuple(flag.methods),
        budgets=tuple(flag.budgets),
        tasks=tuple(flag.tasks),
        lengths=cli.numbers("lengths", flag.lengths),
        samples=flag.samples,
        seeds=cli.numbers("seeds", flag.seeds) or tuple(seeds),
        batch_size=flag.batch_size,
    )


def define_benchmark(methods: Sequence[str], budget: str, model: str, cost: str) -> None:
    """What is timed.

    budget, cost: what --budget and --chip_price are of; model: what is made at random.
    """
    flags.DEFINE_string("workdir", None, "also append the rows to benchmark.jsonl there")
    flags.DEFINE_list("methods", list(methods), "beside each other")
    flags.DEFINE_list("contexts", [], "tokens of a prompt (default: tasks.eval_lengths)")
    flags.DEFINE_list("batch_sizes", ["1"], "prompts at once")
    flags.DEFINE_integer("budget", None, f"{budget} (default: the config's)")
    flags.DEFINE_integer("new_tokens", _TIMES.new_tokens, "timed steps")
    flags.DEFINE_integer("repeats", _TIMES.repeats, "prompts per row")
    about = f"of a random {model} (default: the config's); 0: those that fit"
    flags.DEFINE_integer("layers", None, about, lower_bound=0)
    flags.DEFINE_float("chip_price", None, f"per chip-hour: adds cost per {cost}")
    define_running("the config's or checkpoint's")


def timing(config: Any, **others: Any) -> benchmark.Options:
    """What `define_benchmark` took, beside a long-context config."""
    flag = cli.FLAGS
    return benchmark.Options(
        methods=tuple(flag.methods),
        contexts=cli.numbers("contexts", flag.contexts) or config.tasks.eval_lengths,
        batch_sizes=cli.numbers("batch_sizes", flag.batch_sizes),
        budget=flag.budget,
        new_tokens=flag.new_tokens,
        repeats=flag.repeats,
        implementation=cli.implementation(),
        seed=config.train.seed,
        **others,
    )


def kept(config: Config) -> Workdir | None:
    """The folder of --workdir, with the config unless a run is there; None without. Raises
    UserError."""
    if cli.FLAGS.workdir is None:
        return None
    workdir = Workdir(cli.FLAGS.workdir)
    workdir.create(config)
    if not (workdir.path / "config.json").exists():  # a run keeps its own
        workdir.record(config)
    return workdir


def define_prompt() -> None:
    """One prompt, as text or as a file."""
    flags.DEFINE_string("prompt", None, "the prompt")
    flags.DEFINE_string("prompt_file", None, "a file that is the prompt")
    flags.DEFINE_bool("chat", None, "through the chat template (default: if there is one)")
    flags.DEFINE_integer("seed", 0, "of the draws")


def text() -> str:
    """What `define_prompt` took. Raises UserError."""
    prompt, path = cli.FLAGS.prompt, cli.FLAGS.prompt_file
    if (prompt is None) == (path is None):
        raise UserError("pass one of --prompt and --prompt_file")
    if prompt is None:
        try:
            prompt = pathlib.Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: {reason}") from None
    if not prompt:
        raise UserError("the prompt is empty" if path is None else f"{path} is empty")
    return prompt
