# SPDX-License-Identifier: Apache-2.0
"""LAQ++ (arXiv 2505.20334): the target itself drafts a few tokens with what SnapKV keeps, and those
vote on all of the prompt once more.

Deviates: the drafted tokens go through the target again behind the whole prompt, so that their
queries are those of the prompt and not of what SnapKV kept, and no whole cache is held: twice the
prefill in place of the memory. An end of text is no drafted token.
"""

import dataclasses

from lm.config import ModelConfig
from lm.draft_inference.draft import FromKept, Lookahead
from lm.draft_inference.watch import Watch
from lm.errors import UserError
from lm.long_context import decode
from lm.long_context.program import Program, Request
from lm.transformer import Params


@dataclasses.dataclass(frozen=True)
class OwnDraft(FromKept):
    """Token after token."""

    def check(self, target: ModelConfig) -> None:
        del target  # it is the target

    def look(
        self,
        program: Program,
        params: Params,
        request: Request,
        tokens: int,
        watch: Watch | None,
        room: int = 0,
    ) -> Lookahead:
        if room:
            raise UserError("LAQ++ drafts once")
        if watch is not None or tokens < 1:
            raise UserError("LAQ++ drafts at least one token, and nothing is seen of its attention")
        program = self.program(program, request.tokens.shape[1], tokens)
        state = decode.prefill(program, params, *request)
        state = decode.advance(decode.stepping(program), params, state, request.stop_ids, tokens)
        return Lookahead(state.tokens, state.counts, None)
