# SPDX-License-Identifier: Apache-2.0
"""What the threaded decoder can be put together with, by name.

    none                    the decoder by itself
    evict:METHOD:TOKENS     a prompt of which an evictor of `lm.long_context` keeps so many tokens
    spec_kv:TOKENS          the same, by the votes of a draft model's tokens (SpecKV)
    token_select:TOKENS     a prompt of which every step picks so many tokens (TokenSelect)
    cp_heads                drafts inside each thread

What comes of another paper's room is handed in, as a `Makers`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from lm.async_decoding import evicted
from lm.async_decoding.composed import Composition
from lm.async_decoding.drafting import Drafting, Proposer
from lm.async_decoding.evicted import Thinned
from lm.async_decoding.selected import Selected
from lm.errors import UserError
from lm.long_context.policy import Method, Policy

NONE, EVICT, SPEC_KV, TOKEN_SELECT = "none", "evict", "spec_kv", "token_select"
CP_HEADS = "cp_heads"
FORMS = {
    NONE: "none",
    EVICT: "evict:METHOD:TOKENS",
    SPEC_KV: "spec_kv:TOKENS",
    TOKEN_SELECT: "token_select:TOKENS",
    CP_HEADS: "cp_heads",
}


@dataclasses.dataclass(frozen=True)
class Makers:
    """What other rooms have, for one model; what is None is refused. Each raises UserError for what
    it cannot make.

    spec_kv: from the tokens that are kept, a method whose `inner` is an evictor.
    token_select: from the tokens that a step reads, a policy with keys at their true positions.
    cp_heads: what drafts, and its weights.
    stop_ids: end what a draft model writes.
    """

    spec_kv: Callable[[int], Method] | None = None
    token_select: Callable[[int], Policy] | None = None
    cp_heads: Callable[[], tuple[Proposer, Any]] | None = None
    stop_ids: tuple[int, ...] = ()


NOTHING = Makers()


@dataclasses.dataclass(frozen=True)
class Named:
    """A composition as it was asked for."""

    text: str
    name: str
    method: str = ""
    budget: int = 0


def parse(text: str) -> Named:
    """What a text names. Raises UserError for anything else, with what there is."""
    name, *rest = text.split(":")
    known = ", ".join(FORMS.values())
    if name not in FORMS or len(rest) != FORMS[name].count(":"):
        raise UserError(
            f"--compose={text}: {known}, with METHOD one of {', '.join(evicted.uniform())}"
        )
    if not rest:
        return Named(text, name)
    budget = rest[-1]
    if not budget.isdigit() or not int(budget):
        raise UserError(f"--compose={text}: {budget!r} is no number of tokens")
    named = Named(text, name, rest[0] if name == EVICT else "", int(budget))
    if name == EVICT:
        evicted.build(named.method, named.budget)
    return named


def build(text: str, makers: Makers) -> tuple[Composition, Any]:
    """The composition that a text names, and its weights. Raises UserError."""
    named = parse(text)
    if named.name == NONE:
        return Composition(), ()
    if named.name == EVICT:
        return Thinned(evicted.build(named.method, named.budget)), ()
    if named.name == TOKEN_SELECT:
        if makers.token_select is None:
            raise UserError(f"--compose={text}: no selection was named")
        return Selected(makers.token_select(named.budget)), ()
    if named.name == CP_HEADS:
        if makers.cp_heads is None:
            raise UserError(f"--compose={text}: no head was named")
        proposer, weights = makers.cp_heads()
        return Drafting(proposer), weights
    if makers.spec_kv is None:
        raise UserError(f"--compose={text}: no draft model was named")
    return Thinned(makers.spec_kv(named.budget), makers.stop_ids), ()
