# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is asked for: methods and budgets, tasks or a file, and how it runs."""

import dataclasses
import re

from lm.config import require_positive
from lm.errors import UserError
from lm.long_context.methods import Methods

QUESTIONS = ("aware", "agnostic")


@dataclasses.dataclass(frozen=True)
class Budget:
    """Tokens that a step may read: a number or a share of the context, altogether or ("k=") beside
    the first and the recent ones."""

    text: str
    value: float
    share: bool
    beside: bool

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Of "512", "5%", "k=256" or "k=5%". Raises UserError."""
        match = re.fullmatch(r"(k=)?(\d+(?:\.\d+)?)(%?)", text.strip())
        if match is None or (not match[3] and "." in match[2]) or not float(match[2]):
            raise UserError(f"--budgets={text!r}: expected tokens, or a share such as 5% or k=5%")
        value = float(match[2])
        if match[3] and value > 100:
            raise UserError(f"--budgets={text!r}: a share is at most 100%")
        return cls(text.strip(), value, bool(match[3]), bool(match[1]))

    def total(self, methods: Methods, length: int) -> int:
        """Tokens in a context of `length`, what "k=" leaves out included."""
        tokens = max(1, round(self.value / 100 * length)) if self.share else int(self.value)
        return tokens + (methods.ends if self.beside else 0)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared, and on what.

    methods: names of the table, () its usual ones; dense attention is always measured.
    budgets: () takes the table's own.
    tasks, lengths, samples: () and 0 take those of the config's `tasks`; not with `data`.
    data: a file of prompts instead (`asking.read`), with `max_new_tokens` each in
      a context of `capacity` (None: what the longest takes). A file in LongBench's format
      (`lm.long_context.longbench`) has tokens and scorers of its own; `templates`: its prompts.
    questions: "aware": a method that drops parts of a prompt sees the question when it chooses, as
      published; "agnostic": it sees what comes before the question alone.
    chat: through the checkpoint's template; None: for a Hugging Face directory that has one.
    tuned: a workdir of `tune` or its tuned.json: settings in place of the config's.
    timed: also measure latency, on the first batch of each row; None: with `data`.
    """

    methods: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    samples: int = 0
    seeds: tuple[int, ...] = (0,)
    questions: tuple[str, ...] = ("aware",)
    data: str = ""
    templates: str = ""
    max_new_tokens: int = 128
    capacity: int | None = None
    chat: bool | None = None
    timed: bool | None = None
    batch_size: int = 8
    tuned: str = ""
    dtype: str | None = None
    implementation: str | None = None

    def __post_init__(self):
        if not self.seeds:
            raise UserError("--seeds: at least one is needed")
        for budget in self.budgets:
            Budget.parse(budget)
        for name in ("max_new_tokens", "batch_size"):
            require_positive(f"--{name}", getattr(self, name))
        for length in self.lengths:
            require_positive("--lengths", length)
        if not self.questions or not set(self.questions) <= set(QUESTIONS):
            raise UserError(f"--questions: expected some of {', '.join(QUESTIONS)}")
        if self.templates and not self.data:
            raise UserError("--templates are of --data in LongBench's format")
        if self.samples < 0:
            raise UserError(f"--samples={self.samples} must be at least 1")
        made = self.tasks or self.lengths or self.samples or self.seeds != (0,)
        if self.data and made:
            raise UserError("--data brings its own prompts: no tasks, lengths, samples or seeds")
        if self.capacity is not None and not self.data:
            raise UserError("--capacity is of --data; samples of tasks have --lengths")
