# SPDX-License-Identifier: Apache-2.0
"""Drafts from a CP head: conditionals of the joint by Bayes' rule, one token after the other.

The belief b over components starts as the gate and learns from every token:

    q_s = sum_c softmax(b)_c p_{c,s};  x_s ~ q_s;  b += log p_{.,s}(x_s), then the transition

The token that follows the hidden state is known when a cycle starts, since the last cycle emitted
it: factor 0 serves to condition on it, and that is where a rank above 1 pays. Factors 1..P-1 then
draft P - 1 tokens.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm import sampling as draws
from lm.config import ModelConfig, SamplingConfig
from lm.cp_heads import head
from lm.cp_heads.head import HeadConfig, HeadParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """All that a head says at one position of each sequence, float32."""

    log_w: jax.Array  # [B, R]
    log_p: tuple[jax.Array, ...]  # P of [B, R, V'], over the draft vocabulary
    log_a: tuple[jax.Array | None, ...]  # P of [B, R, R]; None: components stay
    ids: jax.Array | None  # [V'] the draft vocabulary, ascending; None: all tokens
    vocab: int = dataclasses.field(metadata={"static": True})  # V


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """What a drafter proposes to follow the last token: C chains of n tokens."""

    tokens: jax.Array  # [B, C, n] int32
    log_q: jax.Array | None  # [B, C, n, V] float32, what each was drawn from; None when greedy


def factors(
    params: HeadParams,
    config: HeadConfig,
    model: ModelConfig,
    states: jax.Array,  # [B, D], final-norm states in the compute dtype
    table: jax.Array,  # [V, D], the model's unembedding
    valid_vocab: int | None = None,
) -> Factors:
    """The gate, every factor and every transition at one position."""
    return Factors(
        log_w=head.gate(params, states),
        log_p=_log_probs(params, config, model, states, table, valid_vocab),
        log_a=tuple(
            head.transition(params, config, states, step) for step in range(config.predicted)
        ),
        ids=params["vocab"]["ids"] if "vocab" in params else None,
        vocab=table.shape[0],
    )


def _log_probs(params, config, model, states, table, valid_vocab) -> tuple[jax.Array, ...]:
    """P of [B, R, V']."""
    steps = range(config.predicted)
    if config.expander == "direct":
        options = {"softcap": model.logit_softcap, "valid_vocab": valid_vocab}
        logits = [head.logits(params, config, states, s, table, **options) for s in steps]
        return tuple(map(jax.nn.log_softmax, logits))
    # one product for all factors: at small batches reading the matrix is what a draft costs
    z = jnp.stack([head.components(params, config, states, step) for step in steps])
    weights = head.output_table(params, config, table, 0).astype(z.dtype)
    logits = jnp.einsum("pbrd,vd->pbrv", z, weights, preferred_element_type=jnp.float32)
    if model.logit_softcap is not None:
        logits = model.logit_softcap * jnp.tanh(logits / model.logit_softcap)
    if "vocab" not in params:
        logits = draws.masked_logits(logits, valid_vocab)
    return tuple(jax.nn.log_softmax(logits))


def conditional(belief: jax.Array, log_p: jax.Array) -> jax.Array:
    """log q [B, C, V'] of the next token: the mixture of log_p [B, R, V'] under beliefs
    [B, C, R]."""
    belief = jax.nn.log_softmax(belief)
    return jax.nn.logsumexp(belief[..., None] + log_p[:, None], axis=-2)


def observe(belief: jax.Array, seen: jax.Array, log_a: jax.Array | None) -> jax.Array:
    """Beliefs [B, C, R] after a token whose log-probabilities [B, C, R] under the components are
    `seen`, and after the transition [B, R, R].

    A token that no component can produce teaches nothing, as a masked target in training.
    """
    possible = jnp.max(seen, axis=-1, keepdims=True) > -jnp.inf
    belief = jax.nn.log_softmax(belief + jnp.where(possible, seen, 0.0))
    if log_a is None:
        return belief
    return jax.nn.logsumexp(belief[..., None] + log_a[:, None], axis=-2)


def first_belief(factors: Factors, last: jax.Array) -> jax.Array:
    """Belief [B, R] over the components after the known token `last` [B]."""
    index, known = _index(factors, last[:, None])
    seen = jnp.where(known[..., None], _seen(factors.log_p[0], index), -jnp.inf)
    return observe(factors.log_w[:, None], seen, factors.log_a[0])[:, 0]


def starts(belief: jax.Array, chains: int) -> jax.Array:
    """Beliefs [B, C, R] that chains start from: one starts from all that is known, [B, R]; several
    from the `chains` most likely components, one each."""
    if chains == 1:
        return belief[:, None]
    _, likely = jax.lax.top_k(belief, chains)  # [B, C]
    components = jnp.arange(belief.shape[-1])[None, None]
    return jnp.where(components == likely[..., None], 0.0, -jnp.inf)


def walk(
    factors: Factors,
    last: jax.Array,  # [B] int32
    sampling: SamplingConfig,
    chains: int,
    choose: Callable[[int, jax.Array], jax.Array],
) -> tuple[jax.Array, list[jax.Array]]:
    """Drafts along the tokens that `choose(step, log_q [B, C, V'])` returns, as indices [B, C] into
    the draft vocabulary.

    Returns the tokens [B, C, P - 1] and log q [B, C, V'] of every step as `sampling` filters it.
    """
    belief = starts(first_belief(factors, last), chains)
    chosen, laws = [], []
    for step in range(1, len(factors.log_p)):
        log_q = conditional(belief, factors.log_p[step])
        if not draws.is_greedy(sampling):
            log_q = draws.log_probs(log_q, sampling)
        index = choose(step, log_q)
        belief = observe(belief, _seen(factors.log_p[step], index), factors.log_a[step])
        chosen.append(index if factors.ids is None else factors.ids[index])
        laws.append(log_q)
    if not chosen:
        return jnp.zeros((*last.shape, chains, 0), jnp.int32), []
    return jnp.stack(chosen, axis=-1).astype(jnp.int32), laws


def propose(
    factors: Factors,
    last: jax.Array,  # [B] int32
    sampling: SamplingConfig,
    keys: jax.Array,  # [B] keys
    chains: int = 1,
) -> Draft:
    """Draws P - 1 tokens for each chain; greedy sampling takes the most likely ones.

    The filters of `sampling` apply to the mixture, exactly as they do to the model's own
    distribution.
    """
    greedy = draws.is_greedy(sampling)

    def choose(step, log_q):
        if greedy:
            return jnp.argmax(log_q, axis=-1)

        def draw(key, log_q):
            return jax.random.categorical(jax.random.fold_in(key, step), log_q)

        return jax.vmap(draw)(keys, log_q)

    tokens, laws = walk(factors, last, sampling, chains, choose)
    return Draft(tokens, None if greedy else _laws(factors, laws, tokens.shape[:2]))


def conditionals(
    factors: Factors,
    last: jax.Array,  # [B] int32
    tokens: jax.Array,  # [B, C, P - 1] int32, of the draft vocabulary
    sampling: SamplingConfig,
) -> jax.Array:
    """log q [B, C, P - 1, V] of every step of given drafts: what `propose` would draw from."""
    index, _ = _index(factors, tokens)
    _, laws = walk(factors, last, sampling, tokens.shape[1], lambda step, _: index[..., step - 1])
    return _laws(factors, laws, tokens.shape[:2])


def _laws(factors: Factors, laws: list[jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """[B, C, P - 1, V] from the steps' [B, C, V']."""
    if not laws:
        return jnp.zeros((*shape, 0, factors.vocab), jnp.float32)
    stacked = jnp.stack(laws, axis=2)
    if factors.ids is None:
        return stacked
    return head.scatter({"vocab": {"ids": factors.ids}}, stacked, factors.vocab)


def _seen(log_p: jax.Array, index: jax.Array) -> jax.Array:
    """log_p [B, R, V'] at index [B, C], as [B, C, R]."""
    found = jnp.take_along_axis(log_p, index[:, None, :], axis=2)
    return jnp.swapaxes(found, 1, 2)


def _index(factors: Factors, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Places of tokens in the draft vocabulary, and whether they have one."""
    if factors.ids is None:
        return tokens, jnp.ones(tokens.shape, bool)
    index = jnp.searchsorted(factors.ids, tokens)
    index = jnp.minimum(index, factors.ids.shape[0] - 1)
    return index, factors.ids[index] == tokens
