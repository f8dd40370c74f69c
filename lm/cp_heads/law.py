# SPDX-License-Identifier: Apache-2.0
"""The exact law of what decoding emits, for a vocabulary of a few tokens: no sampling, no noise.

Every draft, every decision to keep a token and every replacement is enumerated with its
probability, through the functions that decode: drafts from `draft`, laws from the trunk over its
cache, decisions from `acceptance`. Cycles chain, since a cycle depends only on what has been
emitted before it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from lm import contexts, sampling, transformer
from lm.cp_heads import decode, draft
from lm.cp_heads.draft import Draft
from lm.cp_heads.drafters import Heads, Target
from lm.cp_heads.head import HeadParams
from lm.transformer import Params
from ops.visibility import Visibility


def target_law(target: Target, params: Params, prompt: np.ndarray, length: int) -> np.ndarray:
    """Probability [V] * length of every continuation, from plain full forward passes."""
    V = target.model.vocab_size
    strings = _strings(V, length)
    tokens = np.concatenate([np.tile(prompt, (len(strings), 1)), strings], axis=1)
    laws = np.asarray(_full_laws(target, params, tokens), np.float64)
    steps = np.take_along_axis(laws[:, len(prompt) - 1 : -1], strings[..., None], axis=-1)[..., 0]
    return np.exp(steps.sum(axis=1)).reshape((V,) * length)


def emitted_law(
    target: Target,
    params: Params,
    drafter: Heads,
    weights: HeadParams,
    prompt: np.ndarray,  # [n] int32
    length: int,
) -> np.ndarray:
    """Probability [V] * length of everything that decoding can emit after the prompt; length is at
    least 2, since the first token is the prompt's own."""
    V, C, n = target.model.vocab_size, drafter.chains, drafter.length
    out = np.zeros(V**length)
    # the mass with which a cycle starts after a string, by its length
    starts = {depth: np.zeros(V**depth) for depth in range(1, length)}
    drafts = _strings(V, C * n).reshape(-1, C, n)
    for depth, strings, found in _cycles(
        target, params, drafter, weights, prompt, drafts, range(1, length)
    ):
        if depth == 1:
            starts[1] = np.exp(found[0][0], dtype=np.float64)
        for row, string in enumerate(strings):
            mass = starts[depth][row]
            for emitted, chance in _outcomes(drafts, *(x[row] for x in found[1:])):
                whole = (*string, *emitted)
                ends = out if len(whole) >= length else starts[len(whole)]
                ends[_index(whole[:length], V)] += mass * chance
    return out.reshape((V,) * length)


def _outcomes(drafts, drawn, chances, accepted, chains, laws):
    """Yields (tokens emitted, probability) of one cycle: `drawn` [drafts], the rest [drafts,
    patterns]."""
    for index in np.flatnonzero(drawn):
        for pattern in np.flatnonzero(chances[index]):
            at = index, pattern
            kept = drafts[index, chains[at], : accepted[at]]
            law = np.exp(laws[at], dtype=np.float64)
            chance = float(drawn[index]) * float(chances[at])
            for token in np.flatnonzero(law):
                yield (*kept, token), chance * law[token]


def _cycles(target, params, drafter, weights, prompt, drafts, depths):
    """Yields (depth, strings, what `_cycle` finds after each) for the strings of every depth. All
    are one ragged batch, each with every draft."""
    V = target.model.vocab_size
    strings = [_strings(V, depth) for depth in depths]
    total = sum(map(len, strings))
    tokens = np.zeros((total, len(prompt) + max(depths) - 1), np.int32)
    tokens[:, : len(prompt)] = prompt
    lengths = np.repeat([len(prompt) + depth - 1 for depth in depths], [*map(len, strings)])
    last = np.concatenate([x[:, -1] for x in strings])
    row = 0
    for block in strings:
        tokens[row : row + len(block), len(prompt) :][:, : block.shape[1] - 1] = block[:, :-1]
        row += len(block)
    found = _cycle(target, drafter, params, weights, tokens, lengths, last, drafts)
    found = jax.device_get(found)
    row = 0
    for depth, block in zip(depths, strings, strict=True):
        yield depth, block, [x[row : row + len(block)] for x in found]
        row += len(block)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cycle(
    target: Target,
    drafter: Heads,
    params: Params,
    weights: HeadParams,
    tokens: jax.Array,  # [B, T] int32: what is in the cache, padded on the right
    lengths: jax.Array,  # [B] int32
    last: jax.Array,  # [B] int32, the token after it
    drafts: jax.Array,  # [drafts, C, n] int32
) -> tuple[jax.Array, ...]:
    """The law [B, V] of the first token after what is in the cache. Then, of every draft after
    every string, how likely it is, [B, drafts]; and under each pattern of decisions, [B, drafts,
    patterns], its probability, how much is kept, of which chain, and the law of the next token,
    [.., V]."""
    capacity = tokens.shape[1] + 1 + drafter.length
    states, cache = decode.prefill_states(target, params, tokens, lengths, capacity)
    first = sampling.log_probs(decode.logits_of(target, params, states), target.sampling)
    B, D = len(lengths), len(drafts)
    patterns = jnp.asarray(_strings(2, drafter.chains * drafter.length), jnp.float32)
    patterns = patterns.reshape(-1, drafter.chains, drafter.length)
    # string after string, each with all drafts
    every = functools.partial(jnp.repeat, repeats=D, total_repeat_length=B * D)
    states, last = every(states, axis=0), every(last, axis=0)
    cache = contexts.Cache(
        every(cache.k, axis=1), every(cache.v, axis=1), every(cache.lengths, axis=0)
    )
    tokens = jnp.tile(drafts, (B, 1, 1))
    table = transformer.unembedding(target.model, params)
    factors = draft.factors(
        weights, drafter.config, target.model, states, table, target.valid_vocab
    )
    log_q = draft.conditionals(factors, last, tokens, target.sampling)
    drawn = jnp.take_along_axis(log_q, tokens[..., None], axis=-1)
    states, _ = decode.trunk(target, params, cache, last, tokens)
    logits = decode.logits_of(target, params, states)

    def decide(pattern):  # 1: not kept, since it is below no probability
        uniforms = jnp.broadcast_to(pattern[None], tokens.shape)
        verdict = decode.verdict_of(target, Draft(tokens, log_q), logits, uniforms)
        chance = jnp.where(uniforms > 0, 1 - verdict.keep, verdict.keep)
        chance = jnp.prod(chance, axis=(1, 2))
        return chance, verdict.accepted, verdict.chain, verdict.log_next

    drawn = jnp.exp(jnp.sum(drawn, axis=(1, 2, 3))).reshape(B, D)
    found = jax.vmap(decide, out_axes=1)(patterns)
    return first, drawn, *(x.reshape(B, D, *x.shape[1:]) for x in found)


@functools.partial(jax.jit, static_argnums=0)
def _full_laws(target: Target, params: Params, tokens: jax.Array) -> jax.Array:
    """Log-probabilities [B, T, V] after every token, as drawn from, in one causal pass."""
    B, T = tokens.shape
    context = contexts.Training(Visibility.causal(B, T), implementation="reference")
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    states, _ = transformer.hidden(target.model, params, tokens, positions, context)
    return sampling.log_probs(decode.logits_of(target, params, states), target.sampling)


def _strings(size: int, length: int) -> np.ndarray:
    """All strings, [size ** length, length] int32, the last place changing fastest."""
    return np.array(list(itertools.product(range(size), repeat=length)), np.int32).reshape(
        size**length, length
    )


def _index(string: tuple[int, ...], size: int) -> int:
    index = 0
    for token in string:
        index = index * size + int(token)
    return index
