# SPDX-License-Identifier: Apache-2.0
"""The config of a long-context run: what every run has, and the tasks that it is trained on."""

import dataclasses

from lm.config import Config, require_at_least_zero, require_choice, require_positive
from lm.errors import UserError

PACES = ("documents", "doublings")


@dataclasses.dataclass(frozen=True)
class TasksConfig:
    """Which retrieval tasks a model learns, how long, and what it is asked afterwards.

    Documents are made on the fly from `data.seed`, each with samples of a length drawn between
    `min_length` and a bound that grows to `max_length` over the first `growth` documents: copying
    from afar is learnt first where it is near. `pace` says how: "documents" adds as much with every
    document, "doublings" doubles the bound in about as many tokens each time, so that most
    documents of the way are short.
    """

    names: tuple[str, ...] = ("niah_single_1", "niah_multikey_2", "passkey", "kv_retrieval")
    min_length: int = 128  # tokens of a training sample: context, one question, its answer
    max_length: int = 512  # at most data.seq_len, where more questions about the context follow
    growth: int = 0  # documents; 0: every length from the start
    pace: str = "documents"
    questions: int = 8  # at most so many about one haystack, each unseen by the others
    text_weight: float = 0.05  # of a token that is no answer, where an answer's token counts 1
    haystack: str = ""  # a text file: the essay that some tasks hide their needles in
    eval_lengths: tuple[int, ...] = (512,)  # tokens, those to generate included
    eval_samples: int = 50  # per task and length
    eval_tokens: int = 0  # of an answer, for all tasks: methods compile once; 0: each task's own

    def __post_init__(self):
        if not self.names:
            raise UserError("tasks.names is empty")
        require_positive("tasks.min_length", self.min_length)
        if self.max_length < self.min_length:
            raise UserError(
                f"tasks.max_length={self.max_length} is below tasks.min_length={self.min_length}"
            )
        require_at_least_zero("tasks.growth", self.growth)
        require_choice("tasks.pace", self.pace, PACES)
        require_positive("tasks.questions", self.questions)
        if not 0 <= self.text_weight <= 1:
            raise UserError(f"tasks.text_weight={self.text_weight} must be in [0, 1]")
        for length in self.eval_lengths:
            require_positive("tasks.eval_lengths", length)
        require_positive("tasks.eval_samples", self.eval_samples)
        require_at_least_zero("tasks.eval_tokens", self.eval_tokens)


@dataclasses.dataclass(frozen=True)
class LongContextConfig(Config):
    """Everything a run on long-context tasks needs; `data.source` is "tasks"."""

    tasks: TasksConfig = TasksConfig()
