# SPDX-License-Identifier: Apache-2.0
"""What was dropped of a prompt: by every layer and KV head, with scores; and what that changed."""

import dataclasses
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from lm import plots
from lm.config import SamplingConfig
from lm.draft_inference import pipeline
from lm.draft_inference.method import Drafted
from lm.draft_inference.pipeline import Rollback
from lm.errors import UserError
from lm.long_context import decode, highlights
from lm.long_context.policy import Method
from lm.page import Highlights, Picture, Section, Text
from lm.prompting import Speaker
from lm.text.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Dropped:
    """One prompt under one method; n tokens."""

    prompt: np.ndarray  # [n] int32
    seen: np.ndarray  # [m] int32: places of the tokens that the target saw at all, ascending
    kept: np.ndarray  # [L, K, n] bool; the last token is fed again where it is not kept
    scores: np.ndarray  # [L, K, n] float32: not finite where a token has none
    lookahead: np.ndarray  # [l] int32: what the draft wrote and voted with
    tokens: np.ndarray  # [t] int32: the answer
    again: Rollback  # the same request with everything kept

    def rows(self) -> list[dict[str, Any]]:
        """JSON-ready: a row per layer and KV head with places and scores of what was kept and of
        what was dropped; null is the score of a token that needed none (the window) or that the
        target never saw."""
        out = []
        for layer, head in np.ndindex(*self.kept.shape[:2]):
            kept, scores = self.kept[layer, head], self.scores[layer, head]
            row: dict[str, Any] = {"layer": layer, "head": head}
            for name, chosen in (("kept", kept), ("dropped", ~kept)):
                row[name] = np.flatnonzero(chosen).tolist()
                row[f"{name}_scores"] = [
                    float(f"{x:.6g}") if np.isfinite(x) else None for x in scores[chosen]
                ]
            out.append(row)
        return out

    def shares(self) -> np.ndarray:
        """[n] float32: the share of layers and KV heads that dropped a token."""
        return (~self.kept).mean(axis=(0, 1), dtype=np.float32)


def explain(
    speaker: Speaker,
    method: Method,
    prompt: np.ndarray,
    new_tokens: int,
    implementation: str | None = None,
) -> Dropped:
    """Answers a prompt greedily under a method with a draft, and by dense attention.

    Scores are those that the target kept by; where it kept all that it saw, those of the draft.

    Raises UserError: a method without a draft.
    """
    if not isinstance(method, Drafted):
        raise UserError("only methods with a draft can be explained")
    given = speaker.model, speaker.params, [prompt]
    sampling, key = SamplingConfig(max_new_tokens=new_tokens), jax.random.key(0)
    rest = {"implementation": implementation, "valid_vocab": speaker.valid_vocab}
    (found,) = pipeline.audit(*given, sampling, method, speaker.stop_ids, key, **rest)
    (answer,), _ = decode.decode(*given, sampling, method, speaker.stop_ids, key, **rest)
    (again,) = pipeline.rollback(*given, [answer], sampling, speaker.stop_ids, key, **rest)
    shape = (len(found.kept), len(found.kept[0]), len(prompt))
    kept, scores = np.zeros(shape, bool), np.full(shape, np.nan, np.float32)
    for layer, head in np.ndindex(*shape[:2]):
        kept[layer, head, found.kept[layer][head]] = True
    if found.scores is not None:
        scores[..., found.shown] = found.scores
    elif found.importance is not None:
        scores[:] = found.importance
    return Dropped(prompt, found.shown, kept, scores, found.drafted, answer.tokens, again)


def figure(found: Dropped) -> Figure:
    """Layers and KV heads by tokens: what was dropped."""
    labels = [f"layer {layer} head {head}" for layer, head in np.ndindex(*found.kept.shape[:2])]
    values = (~found.kept).reshape(len(labels), -1).astype(np.float32)
    return plots.heat(values, labels, "token of the prompt", "dropped")


def section(title: str, found: Dropped, tokenizer: Tokenizer, png: bytes) -> Section:
    """What stands on the page about one prompt."""
    answer, dense = (tokenizer.decode(ids) for ids in (found.tokens, found.again.dense.tokens))
    blocks = [
        Text(
            f"{len(found.prompt):,} tokens, of which the target saw {len(found.seen):,}; a KV head "
            f"kept {found.kept.sum(axis=2).mean():,.0f} on average. Answer: {answer!r}"
        ),
        Text(f"With nothing dropped: {dense!r} (agreement {found.again.agreement:.0%})"),
    ]
    if len(found.lookahead):
        blocks.append(Text(f"The draft wrote: {tokenizer.decode(found.lookahead)!r}"))
    marked = highlights.pieces(found.prompt, found.shares(), tokenizer)
    return Section(
        title,
        (
            *blocks,
            Picture("What every layer and KV head dropped", png),
            Highlights("Share of layers and KV heads that dropped a token", marked),
        ),
    )
