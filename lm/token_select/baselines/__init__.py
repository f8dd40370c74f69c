# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: each a policy that reads the same number of tokens at a step.

| name | picks | prompt | positions |
|---|---|---|---|
| dense | everything | dense | true |
| token_select | votes of the step's own queries | as `select.prefill` | as `select.positions` |
| streaming_llm | nothing: first and recent tokens | as `select.prefill` | packed |
| infllm | blocks, by representative keys | as `select.prefill` | as `select.positions` |
| quest | pages, by bounds on products | dense | true |
| h2o | tokens with the most attention so far | dense | true |
| snapkv | tokens that the prompt's last queries voted for | dense | true |
| random | at random | as `select.prefill` | as `select.positions` |

A dense prompt costs what dense attention does, and cannot read beyond the trained length.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from lm.errors import UserError
from lm.token_select.baselines.h2o import H2O
from lm.token_select.baselines.infllm import InfLLM
from lm.token_select.baselines.quest import Quest
from lm.token_select.baselines.random import Random
from lm.token_select.baselines.reading import block_size
from lm.token_select.baselines.snapkv import SnapKV
from lm.token_select.baselines.streaming_llm import StreamingLLM
from lm.token_select.config import SelectConfig
from lm.token_select.method import TokenSelect
from lm.token_select.policy import Dense, Policy

__all__ = ["DENSE", "METHODS", "build"]

DENSE = "dense"


def build(name: str, config: SelectConfig, budget: int | None) -> Policy:
    """A method by name, reading `budget` tokens at a step (`select.n_init`, k and n_local
    together), None for "dense".

    Raises UserError for an unknown name, or a budget that leaves nothing to pick.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name](config, budget)


def _dense(config: SelectConfig, budget: int | None) -> Policy:
    if budget is not None:
        raise UserError(f"dense attention reads everything: it takes no budget of {budget} tokens")
    return Dense(config.chunk)


def _token_select(config: SelectConfig, budget: int) -> Policy:
    # what `reuse` may add for a while is within the budget, too
    k = _between(config, budget, config.slack)
    return TokenSelect(dataclasses.replace(config, k=k))


def _streaming_llm(config: SelectConfig, budget: int) -> Policy:
    return StreamingLLM(budget, config.chunk, prefill=config.prefill)


def _infllm(config: SelectConfig, budget: int) -> Policy:
    size = block_size(_between(config, budget), 128)
    return InfLLM(budget, config.chunk, **_shared(config), block=size)


def _quest(config: SelectConfig, budget: int) -> Policy:
    return Quest(budget, config.chunk, page=block_size(budget, 16))


def _h2o(config: SelectConfig, budget: int) -> Policy:
    return H2O(budget, config.chunk, recent=max(1, budget // 2))


def _snapkv(config: SelectConfig, budget: int) -> Policy:
    return SnapKV(budget, config.chunk, window=min(64, config.n_local))


def _random(config: SelectConfig, budget: int) -> Policy:
    _between(config, budget)
    return Random(budget, config.chunk, **_shared(config))


def _shared(config: SelectConfig) -> dict[str, Any]:
    """What methods that select in the way of TokenSelect take over."""
    names = ("n_init", "n_local", "prefill", "rope", "positions")
    return {name: getattr(config, name) for name in names}


def _between(config: SelectConfig, budget: int, spent: int = 0) -> int:
    """What is left of a budget beside the ends and what is `spent` otherwise."""
    k = budget - config.n_init - config.n_local - spent
    if k < 1:
        raise UserError(
            f"a budget of {budget} tokens leaves nothing to select beside select.n_init="
            f"{config.n_init} and select.n_local={config.n_local}"
            + (f" and {spent} for select.reuse" if spent else "")
        )
    return k


METHODS: dict[str, Callable[[SelectConfig, int | None], Policy]] = {
    DENSE: _dense,
    "token_select": _token_select,
    "streaming_llm": _streaming_llm,
    "infllm": _infllm,
    "quest": _quest,
    "h2o": _h2o,
    "snapkv": _snapkv,
    "random": _random,
}
