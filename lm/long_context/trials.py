# SPDX-License-Identifier: Apache-2.0
"""Trying settings on fixed questions: what tuning measures, and the search for the least setting
that will do."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from lm.long_context import asking, quality
from lm.long_context.asking import Answers, Questions
from lm.long_context.judge import Judge
from lm.long_context.methods import DENSE
from lm.long_context.policy import Method
from lm.progress import Progress, say

S = TypeVar("S", bound=Hashable)  # a paper's settings


class Trial(Generic[S]):
    """Measures settings on fixed questions, each once."""

    def __init__(
        self,
        judge: Judge,
        questions: Sequence[Questions],
        method: str,  # as rows call it
        about: Callable[[S], Mapping[str, Any]],  # what a row says of settings: numbers, names
        policy: Callable[[S], Method],
    ):
        self._judge, self._questions = judge, questions
        self._method, self._about, self._policy = method, about, policy
        dense = judge.methods.build(DENSE, None)
        with Progress("dense", sum(len(q.prompts) for q in questions)) as progress:
            self._dense = [self._ask(dense, q, progress) for q in questions]
        self._known: dict[S, dict[str, Any]] = {}

    def __call__(self, settings: S) -> dict[str, Any]:
        """A row: the settings, mean agreement with dense decoding, and what was read."""
        if settings not in self._known:
            pairs, reads, about = [], [], self._about(settings)
            name = " ".join(
                f"{key}={value}" if isinstance(value, str) else f"{key}={value:g}"
                for key, value in about.items()
            )
            with Progress(name, sum(len(q.prompts) for q in self._questions)) as progress:
                for questions, dense in zip(self._questions, self._dense, strict=True):
                    answers = self._ask(self._policy(settings), questions, progress)
                    pairs += zip(answers.tokens, dense.tokens, strict=True)
                    reads.append(answers.reads)
            agreement = [quality.agreement(*pair) for pair in pairs]
            reads = np.concatenate(reads)
            row = {
                "kind": "tune",
                "method": self._method,
                **about,
                "agreement": float(np.mean(agreement)),
                "agreement_ci95": list(quality.interval(agreement)),
                "edit_distance": float(np.mean([quality.edit_distance(*pair) for pair in pairs])),
                "tokens_read": None if np.isnan(reads).all() else float(np.nanmean(reads)),
                "samples": len(pairs),
            }
            say(f"{name}: agreement {row['agreement']:.3f}")
            self._known[settings] = row
        return self._known[settings]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self._known.values())

    def _ask(self, policy: Method, questions: Questions, progress: Progress) -> Answers:
        batch = self._judge.options.batch_size
        return asking.ask(self._judge.method(policy), questions, batch, progress)


def first(settings: Sequence[S], good: Callable[[S], bool]) -> S | None:
    """The first that is good, sought by halving: all after it are taken to be good, too; None where
    none is."""
    low, high = 0, len(settings)  # below low none is, from high on all are
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(settings[middle]) else (middle + 1, high)
    return settings[low] if low < len(settings) else None
