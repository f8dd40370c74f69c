# SPDX-License-Identifier: Apache-2.0
"""A draft before the target: what it drafts votes in the target (SpecKV), what it attended to
shortens the prompt (SpecPC), or both, in one pass of the draft (SpecKV-PC).

A `Drafted` is a method like any other to whatever decodes, evaluates or times. Its `ahead` runs the
draft; the target's compiled programs know the `Evictor` alone, so that any draft serves them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.config import ModelConfig, SamplingConfig
from lm.draft_inference import compression
from lm.draft_inference.compression import Chosen, Compressor
from lm.draft_inference.draft import Drafter, Lookahead
from lm.errors import UserError
from lm.long_context.eviction import layer_major
from lm.long_context.eviction.adakv import AdaKV
from lm.long_context.eviction.evictor import Evictor
from lm.long_context.policy import Method, State
from lm.long_context.program import Program, Request
from lm.sharding import Sharding
from lm.transformer import Params


class Found(NamedTuple):
    """What a draft made of a request."""

    request: Request  # as prefill takes it
    lookahead: Lookahead
    chosen: Chosen | None  # of the prompts' tokens; None: all are there


@dataclasses.dataclass(frozen=True)
class Drafted(Method):
    """`drafter` looks at prompts first.

    keeps: what the target keeps of what it sees; one that takes extra rows gets drafted tokens.
    compressor: what the target sees; None: all of a prompt.
    lookahead: tokens that are drafted at most; None: as many as are generated.
    """

    drafter: Drafter
    keeps: Evictor
    compressor: Compressor | None = None
    lookahead: int | None = None

    @property
    def drafts(self) -> bool:
        return True

    @property
    def limit(self) -> int:
        return self.keeps.budget

    @property
    def learns(self) -> bool:
        return True

    @property
    def steps(self) -> Method:
        return self.keeps.steps

    @property
    def votes(self) -> bool:
        """Whether drafted tokens vote in the target."""
        return self.keeps.refeed

    def tokens(self, sampling: SamplingConfig) -> int:
        """That vote in the target."""
        most = sampling.max_new_tokens
        return (most if self.lookahead is None else self.lookahead) if self.votes else 0

    def inner(self, sampling: SamplingConfig) -> Evictor:
        return _with_extra(self.keeps, self.tokens(sampling)) if self.votes else self.keeps

    def check(self, config: ModelConfig, sharding: Sharding | None, capacity: int | None) -> None:
        self.drafter.check(config)
        self.keeps.check(config, sharding, capacity)

    def ahead(self, program: Program, params: Params, request: Request) -> Request:
        return self.look(program, params, request).request

    def look(self, program: Program, params: Params, request: Request, room: int = 0) -> Found:
        """Runs the draft. Raises UserError for rows that a caller put behind the prompts.

        room: see `Drafter.look`.
        """
        if request.rows is not None:
            raise UserError("a method with a draft makes the rows behind a prompt itself")
        extra = program.policy.extra
        width = request.tokens.shape[1] - extra
        whole = request._replace(tokens=request.tokens[:, :width])
        tokens, watch = extra, None
        if self.compressor is not None:
            watch = self.compressor.watch(self.drafter.depth(program.model))
            voting = watch.lookahead
            if voting is None:
                voting = tokens or program.sampling.max_new_tokens
            # a token that votes is one that was fed back, after which another is drawn
            tokens = max(tokens, voting if voting > 1 else 0)
        seen = self.drafter.look(program, params, whole, tokens, watch, room)
        chosen = None
        if self.compressor is not None:
            whole, chosen = compression.compress(self.compressor, whole, seen.importance, extra)
        if self.votes:
            whole = _joined(extra, whole, seen.tokens, seen.counts)
        return Found(whole, seen, chosen)

    def dims(self) -> dict[str, tuple[str | None, ...]]:
        return self.keeps.dims()

    def statistics(self, state: State) -> State:
        return self.keeps.statistics(state)

    def summarize(self, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return self.keeps.summarize(found)


def _with_extra(keeps: Evictor, extra: int) -> Evictor:
    if isinstance(keeps, AdaKV):
        return dataclasses.replace(keeps, base=_with_extra(keeps.base, extra))
    return dataclasses.replace(keeps, extra=extra)


@functools.partial(jax.jit, static_argnums=0)
def _joined(extra: int, request: Request, tokens: jax.Array, counts: jax.Array) -> Request:
    """The drafted tokens behind the prompts, of which at most `extra` are taken."""
    after, number = tokens[:, :extra], counts.clip(max=extra)
    made, rows = layer_major.appended(request.tokens, request.lengths, after, number)
    return request._replace(tokens=made, rows=rows)
