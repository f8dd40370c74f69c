# SPDX-License-Identifier: Apache-2.0
"""How good a draft is: whether it looks where the target looks, and writes what the target writes.

Both models read the prompt and write their own answer; what the tokens of the prompt get of each
one's attention is put together in the same way (`Watch`), and compared as sets and as orders.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lm.config import SamplingConfig
from lm.draft_inference import draft
from lm.draft_inference.config import PromptSettings
from lm.draft_inference.draft import Drafter, Lookahead
from lm.draft_inference.proposals import InBlocks
from lm.draft_inference.watch import Watch
from lm.long_context import decode, quality
from lm.long_context.asking import Questions
from lm.long_context.policy import Dense
from lm.long_context.program import Program
from lm.prompting import Speaker

_LAYERS = 8  # that do not vote, as published; at most half of a model's


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """One prompt. Where a draft's attention is not seen there is no overlap, and no correlation."""

    overlap: float | None  # share of the target's `budget` most important tokens: the draft's, too
    rank_correlation: float | None  # Spearman's, over all tokens of the prompt
    agreement: float  # of the drafted tokens with the target's greedy ones


def measure(
    speaker: Speaker,
    drafter: Drafter,
    settings: PromptSettings,
    questions: Questions,
    budget: int,
    batch_size: int,
    implementation: str | None = None,
) -> list[Fidelity]:
    """Every prompt of the questions. Raises UserError as `Drafter.look` does."""
    model, new = speaker.model, questions.new_tokens
    program = Program(
        model,
        SamplingConfig(max_new_tokens=new),
        Dense(),
        implementation=implementation,
        valid_vocab=speaker.valid_vocab,
    )
    seen = not isinstance(drafter, InBlocks)
    of_draft = watch(settings, drafter.depth(model)) if seen else None
    of_target = watch(settings, model.num_layers)
    found = []
    for first in range(0, len(questions.prompts), batch_size):
        prompts = questions.prompts[first : first + batch_size]
        key = jax.random.key(0)
        made, request = decode.request(program, prompts, speaker.stop_ids, key, questions.length)
        mine = drafter.look(made, speaker.params, request, new, of_draft)
        own = draft.looked(
            made, model, speaker.params, request, new, of_target, valid_vocab=speaker.valid_vocab
        )
        found += _compared(*jax.device_get((mine, own)), prompts, budget)
    return found


def watch(settings: PromptSettings, layers: int) -> Watch:
    """All queries that SpecPC has at these settings, and those of all generated tokens."""
    first = min(_LAYERS, layers // 2) if settings.first_layer is None else settings.first_layer
    return Watch(
        settings.window,
        first,
        weighted=settings.weighted,
        reduce=settings.reduce,
        lookahead=None,
    )


def _compared(
    mine: Lookahead, own: Lookahead, prompts: Sequence[np.ndarray], budget: int
) -> list[Fidelity]:
    found = []
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        texts = [x.tokens[row, : x.counts[row]] for x in (mine, own)]
        looks = None, None
        if mine.importance is not None:
            pair = [np.asarray(x.importance[row, :n], np.float64) for x in (mine, own)]
            looks = overlap(*pair, min(budget, n)), rank_correlation(*pair)
        found.append(Fidelity(*looks, quality.agreement(*texts)))
    return found


def overlap(first: np.ndarray, last: np.ndarray, count: int) -> float:
    """Share of the `count` largest of one that are among those of the other; the lower place wins
    where values are equal."""
    best = [set(np.argsort(-x, kind="stable")[:count].tolist()) for x in (first, last)]
    return len(best[0] & best[1]) / count


def rank_correlation(first: np.ndarray, last: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, equal values sharing theirs; NaN where one of the two
    is the same everywhere."""
    ranks = [_ranks(x) for x in (first, last)]
    if min(rank.std() for rank in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    return (ends - (count - 1) / 2)[place]


def row(found: Sequence[Fidelity], questions: Questions, budget: int) -> dict[str, Any]:
    """Means over prompts, None of what is not known; `chance` is the overlap of two random
    choices."""
    lengths = [len(prompt) for prompt in questions.prompts]
    fields = {
        name: [getattr(one, name) for one in found]
        for name in ("overlap", "rank_correlation", "agreement")
    }
    overlaps = [x for x in fields["overlap"] if x is not None]
    known = [x for x in fields["rank_correlation"] if x is not None]
    correlations = [x for x in known if np.isfinite(x)]
    return {
        "kind": "draft",
        "task": questions.name,
        "length": questions.length,
        "budget": budget,
        "overlap": float(np.mean(overlaps)) if overlaps else None,
        "overlap_ci95": list(quality.interval(overlaps)) if overlaps else None,
        "chance": float(np.mean([min(budget, n) / n for n in lengths])),
        "rank_correlation": float(np.mean(correlations)) if correlations else None,
        "agreement": float(np.mean(fields["agreement"])),
        "samples": len(found),
        "seed": questions.seed,
    }
