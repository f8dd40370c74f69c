# SPDX-License-Identifier: Apache-2.0
"""TokenSelect as a policy: score, vote, pick, or go on with what was picked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import layers
from lm.config import ModelConfig
from lm.errors import UserError
from lm.long_context import lists
from lm.long_context.guard import Guard
from lm.long_context.policy import Policy, Read, State, View
from lm.sharding import Sharding
from lm.token_select import reuse, select
from lm.token_select.config import SelectConfig
from lm.token_select.select import Top


@dataclasses.dataclass(frozen=True)
class TokenSelect(Policy):
    """What a `SelectConfig` asks for; its chunk is the policy's."""

    config: SelectConfig = SelectConfig()
    record: bool = False  # keep what every layer picked last, and its votes

    @property
    def chunk(self) -> int:
        return self.config.chunk

    @property
    def rope(self) -> str:
        return self.config.rope

    @property
    def positions(self) -> str:
        return self.config.positions

    @property
    def shadow(self) -> str:
        return self.config.shadow

    @property
    def head_weights(self) -> tuple[float, ...]:
        return self.config.head_weights

    @property
    def guard(self) -> Guard | None:
        if not self.config.guard_every:
            return None
        return Guard(self.config.guard_every, self.config.guard == "fallback")

    @property
    def limit(self) -> int:
        return self.config.budget

    @property
    def learns(self) -> bool:
        return False  # a selection is made anew where there is none

    def check(self, config: ModelConfig, sharding: Sharding | None, capacity: int | None) -> None:
        given, every = len(self.head_weights), config.num_layers * config.num_heads
        if given not in (0, config.num_heads, every):
            raise UserError(
                f"select.head_weights has {given} numbers: {config.num_heads} (one per query head) "
                f"or {every} (per layer, too) fit the model"
            )
        if self.config.gqa == "modulo" and sharding is not None and sharding.size("heads") > 1:
            raise UserError(
                "select.gqa='modulo' needs mesh.tensor=1: heads vote by keys of other devices"
            )
        budget = self.config.budget + self.config.slack
        if capacity is not None and budget > capacity:
            parts = "select.n_init + k + n_local" + (" + n_local / 4" if self.config.slack else "")
            raise UserError(f"a budget of {budget} ({parts}) is above the context of {capacity}")

    def start(self, config: ModelConfig, batch: int, capacity: int) -> State:
        state = reuse.start(self.config, config, batch) if self.config.reuse else {}
        if self.record:
            lists = (config.num_kv_heads,) if self.config.per_kv_head else ()
            shape = (config.num_layers, batch, *lists)
            state["kept"] = jnp.zeros((*shape, self.config.k), jnp.int32)
            state["votes"] = jnp.zeros((*shape, self.config.k), jnp.float32)
            state["kept_count"] = jnp.zeros(shape, jnp.int32)
        return state

    def dims(self) -> dict[str, tuple[str | None, ...]]:
        found = reuse.dims(self.config) if self.config.reuse else {}
        if self.record:
            lists = ("kv_heads",) if self.config.per_kv_head else ()
            found["kept"] = found["votes"] = ("batch", *lists, None)
            found["kept_count"] = ("batch", *lists)
        return found

    def select(self, state: State, view: View) -> tuple[Read | None, State]:
        config = self.config
        if view.prefill and config.prefill == "dense":
            return None, state
        begin, end = lists.bounds(view.total, config.n_init, config.n_local)
        active = view.rows > 0
        query = view.mean_query(config.n_local if config.rope == "read" else None)
        reusing = bool(config.reuse) and (config.reuse_prefill or not view.prefill)
        hit = jnp.zeros_like(active)
        if reusing:
            hit, state = reuse.look_up(config, state, query, view.total, active, view.heads)
        if reusing or (view.prefill and config.shortcut):
            needed = active & ~hit
            if config.shortcut and not config.coverage and not self.record:
                needed = needed & (end - begin > config.k)
            top = jax.lax.cond(
                jnp.any(needed),
                lambda: self._chosen(query, view, begin, end),
                lambda: select.everything(config, begin, end, view.lists, view.heads),
            )
        else:  # at a branch a GPU asks the host, once a layer
            top = self._chosen(query, view, begin, end)
        tail = end
        if reusing:
            top, tail, state = reuse.update(state, hit, active, query, top, end, view.total)
        if self.record:
            new = {"kept": top.indices, "votes": top.votes, "kept_count": top.counts}
            state = {
                **state,
                **{k: reuse.choose(active & ~hit, x, state[k]) for k, x in new.items()},
            }
        # a selection of fewer than n_init tokens is kept while the first ones grow over its tail
        tail = jnp.maximum(tail, begin)
        size = min(config.budget + config.slack, view.capacity)
        read = lists.listed(begin, top.indices, top.counts, tail, view.total, size)
        return Read(*read), state

    def _chosen(self, query: jax.Array, view: View, begin: jax.Array, end: jax.Array) -> Top:
        config = self.config
        scale = query.shape[-1] ** -0.5 if config.scale_scores else 1.0
        if config.rope == "read":
            # a key at position 0 is the raw key times what YaRN puts on cosines
            scale *= layers.rope_frequencies(view.config)[1]
        return select.choose(
            config,
            query,
            view.buffers,
            view.layer,
            begin,
            end,
            scale=scale,
            heads=view.heads,
            implementation=view.implementation,
        )

    def statistics(self, state: State) -> State:
        wanted = ("decisions", "hits", "compared", "similarity", "kept", "votes", "kept_count")
        return {name: state[name] for name in wanted if name in state}

    def summarize(self, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """`reuse_rate` (of the selections, those that were reused) and `query_similarity` (mean
        cosine to the query that was selected for), over all layers and for each; None where
        nothing was compared."""
        if "hits" not in found:
            return {}
        hits, decisions, compared, similarity = (
            found[name].sum(axis=1) for name in ("hits", "decisions", "compared", "similarity")
        )
        return {
            "reuse_rate": _ratio(hits.sum(), decisions.sum()),
            "reuse_rate_per_layer": [_ratio(*pair) for pair in zip(hits, decisions, strict=True)],
            "query_similarity": _ratio(similarity.sum(), compared.sum()),
            "query_similarity_per_layer": [
                _ratio(*pair) for pair in zip(similarity, compared, strict=True)
            ],
        }


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None
