# SPDX-License-Identifier: Apache-2.0
"""Stages of a step of token selection, ours by any implementation and the formulations that others
use, as functions of (small, large) for `lm.benchmarks.loops`."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lm.benchmarks.loops import Stage
from lm.benchmarks.selection_problem import Problem
from lm.long_context import lists
from lm.long_context.heads import Heads
from lm.token_select import select
from ops.cached_attention import cached_attention
from ops.gathered_attention import gathered_attention
from ops.token_importance import token_importance
from ops.top_tokens import top_tokens


@dataclasses.dataclass(frozen=True)
class Timed:
    """A stage and the bytes that it has to read and write."""

    run: Stage
    bytes: int


def ours(problem: Problem, implementation: str | None) -> dict[str, Timed]:
    """Of a problem with or without a shadow. "score" and "importance" are both of one op: without
    its scores, only the log-sum-exp is computed; "vote" is what the scores take beyond."""
    config, layer = problem.config, jnp.int32(0)
    wanted = select.candidates(config) if config.shadow else config.k

    def importance(small, large):
        buffers = large["buffers"]
        begin, end = lists.bounds(small["total"], config.n_init, config.n_local)
        return token_importance(
            small["query"][:, None],
            buffers.k if buffers.codes is None else buffers.codes,
            begin=begin,
            end=end[:, None],
            layer=layer,
            k_scale=buffers.scales,
            scale=problem.scale,
            return_lse=True,
            implementation=implementation,
        )

    def top(small, large):
        begin, end = lists.bounds(small["total"], config.n_init, config.n_local)
        return top_tokens(
            large["scores"], wanted, begin=begin, end=end, implementation=implementation
        )

    def chosen(small, large):
        begin, end = lists.bounds(small["total"], config.n_init, config.n_local)
        picked = select.choose(
            config,
            small["query"],
            large["buffers"],
            layer,
            begin,
            end,
            scale=problem.scale,
            heads=Heads((), None),
            implementation=implementation,
        )
        return lists.listed(
            begin, picked.indices, picked.counts, end, small["total"], problem.listed
        )

    def attend(small, large):
        return gathered_attention(
            small["q"],
            large["buffers"].k,
            large["buffers"].v,
            small["slots"],
            counts=small["counts"],
            lengths=small["total"],
            layer=layer,
            rope=large["rope"],
            implementation=implementation,
        )

    def step(small, large):
        slots, counts = chosen(small, large)
        return attend(small | {"slots": slots, "counts": counts}, large)

    buffers, read = problem.buffers, problem.read
    keys = problem.bytes_of(buffers.k)
    if config.shadow:
        keys = problem.bytes_of(buffers.codes) + problem.bytes_of(buffers.scales)
        read += wanted * problem.heads.K * problem.heads.H * buffers.k.dtype.itemsize
    scores = 4 * problem.tokens
    stages = {
        "score": Timed(lambda *x: importance(*x)[1], keys),
        "importance": Timed(lambda *x: importance(*x)[0], keys + scores),
        "top_k": Timed(top, scores),
        "select": Timed(chosen, keys),
        "attend": Timed(attend, problem.read),
        "step": Timed(step, keys + read),
    }
    if config.shadow:  # the attention is the same
        del stages["attend"]
    return stages


def published(problem: Problem) -> dict[str, Timed]:
    """The published formulation as plain JAX: products of each head in the type of the keys, their
    softmax over the candidates, its sum over heads, the sorted best."""
    heads, config = problem.heads, problem.config
    first, last = config.n_init, problem.tokens - config.n_local

    def score(small, large):
        query = small["query"].reshape(heads.K, heads.N // heads.K, heads.H)
        return jnp.einsum("KGH,SKH->KGS", query, large["buffers"].k[0, 0])

    def select_(small, large):
        logits = score(small, large)[:, :, first:last].astype(jnp.float32) * problem.scale
        vote = jnp.sum(jax.nn.softmax(logits, axis=-1), axis=(0, 1))
        return jnp.sort(jax.lax.top_k(vote, config.k)[1]) + first

    keys = problem.bytes_of(problem.buffers.k)
    return {"score": Timed(score, keys), "select": Timed(select_, keys)}


def full(problem: Problem, implementation: str | None = None) -> dict[str, Timed]:
    """Attention over the whole cache."""

    def attend(small, large):
        k, v = (x[0] for x in large["buffers"][:2])
        return cached_attention(
            small["q"], k, v, lengths=small["total"], implementation=implementation
        )

    return {"full": Timed(attend, 2 * problem.bytes_of(problem.buffers.k))}


PLAIN: Mapping[str, Callable[[Problem], dict[str, Timed]]] = {"published": published, "dense": full}
