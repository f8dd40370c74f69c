# SPDX-License-Identifier: Apache-2.0
"""The exact negative log-likelihood of a CP head, in float32 and without any [rows, V] array.

With a[s, c] = log p_{c,s}(y_s), log w of the gate and log A of the transitions:

    c[-1] = log w;  e[s] = c[s-1] + a[s];  c[s, j] = LSE_i(e[s, i] + log A_s[i, j])
    c[P-1] = e[P-1]
    log q(y_s | y_<s) = LSE(c[s]) - LSE(c[s-1])

The transition comes after the emission, as in decoding. Only a[s, c] meets the vocabulary, row by
row through `linear_log_prob`; everything else is of size P x R per position, and autodiff gives the
gradients: cross entropy weighted by the responsibilities of the components.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm import losses, transformer
from lm.config import ModelConfig, require_at_least_zero, require_choice
from lm.cp_heads import head
from lm.cp_heads.head import HeadConfig, HeadParams
from lm.errors import UserError

MODES = ("joint", "heads", "lora", "trunk")
_TEACHER_BYTES = 256 << 20  # float32 logits of a chunk of positions, for self-distillation
_TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What a run trains, and how the parts of its loss are weighed."""

    mode: str = "joint"  # "joint", "heads" (frozen trunk), "lora" (and adapters) or "trunk" alone
    lora_layers: int = 0  # adapters of the last so many layers are trained; 0: of all
    next_token: float = 1.0  # weight of the model's own loss, where the model is trained
    head: float = 0.3  # weight of the head's loss beside it; with the head alone it changes nothing
    discount: float = 1.0  # factor s weighs discount^s; 1 is the exact joint likelihood
    balance: float = 0.01  # of KL(uniform | gate averaged over the batch)
    distill: float = 0.0  # share of KL to the model's own distributions, in place of the tokens
    fraction: float = 1.0  # of positions that the head is trained on, drawn anew each step

    def __post_init__(self):
        require_choice("loss.mode", self.mode, MODES)
        for name in ("next_token", "head", "balance", "lora_layers"):
            require_at_least_zero(f"loss.{name}", getattr(self, name))
        for name in ("discount", "fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"loss.{name}={getattr(self, name)} must be in (0, 1]")
        if not 0 <= self.distill <= 1:
            raise UserError(f"loss.distill={self.distill} must be in [0, 1]")


class Futures(NamedTuple):
    """What positions learn (`lm.cp_heads.futures`), on device."""

    rows: jax.Array  # [B, F] int32
    targets: jax.Array  # [B, F, P] int32, -1 past the end
    children: jax.Array  # [B, F, P] int32, -1 past the end
    weights: jax.Array  # [B, F] float32


def joint_log_prob(
    log_w: jax.Array,  # [..., R]
    log_a: jax.Array,  # [..., P, R]
    log_A: jax.Array | None,  # [..., P-1, R, R]; None: components stay
    mask: jax.Array,  # [..., P] bool, true up to the end of the future
) -> jax.Array:
    """log q(y_s | y_<s), [..., P] float32, 0 where masked; the joint is their sum."""
    beliefs = forward_beliefs(log_w, log_a, log_A, mask)
    totals = jax.nn.logsumexp(beliefs, axis=-1)
    return jnp.where(mask, totals[..., 1:] - totals[..., :-1], 0.0)


def forward_beliefs(
    log_w: jax.Array, log_a: jax.Array, log_A: jax.Array | None, mask: jax.Array
) -> jax.Array:
    """c[-1], c[0], ..., c[P-1] as [..., P+1, R] float32: log beliefs, not normalised."""
    P = log_a.shape[-2]
    log_a = jnp.where(mask[..., None], log_a.astype(jnp.float32), 0.0)
    belief = log_w.astype(jnp.float32)
    found = [belief]
    for step in range(P):
        belief = belief + log_a[..., step, :]
        if log_A is not None and step < P - 1:
            moved = belief[..., :, None] + log_A[..., step, :, :].astype(jnp.float32)
            belief = jax.nn.logsumexp(moved, axis=-2)
        found.append(belief)
    return jnp.stack(found, axis=-2)


def transitions(params: HeadParams, config: HeadConfig, h: jax.Array) -> jax.Array | None:
    """All log A [..., P-1, R, R] of hidden states [..., D]; None where components stay."""
    if config.transition == "identity" or config.predicted == 1:
        return None
    steps = range(config.predicted - 1)
    return jnp.stack([head.transition(params, config, h, step) for step in steps], axis=-3)


def component_log_probs(
    params: HeadParams,
    config: HeadConfig,
    h: jax.Array,  # [B, F, D]
    targets: jax.Array,  # [B, F, P] int32, -1: masked
    table: jax.Array,  # [V, D], the model's unembedding
    execution: losses.Execution,
    softcap: float | None = None,
) -> jax.Array:
    """log p_{c,s}(y_s) as [B, F, P, R] float32, 0 where masked; targets index the draft vocabulary
    where there is one (`draft_targets`)."""
    B, F, P = targets.shape
    if config.expander == "direct":
        own = params["expander"]["table"].astype(h.dtype)  # [P, R, V, D]
        out = [
            losses.sharded_log_prob(h, own[s, c], targets[:, :, s], None, execution, softcap)
            for s in range(P)
            for c in range(config.rank)
        ]
        return jnp.stack(out, axis=-1).reshape(B, F, P, config.rank)
    rows, repeated = component_rows(params, config, h, targets)
    weights = head.output_table(params, config, table, 0).astype(h.dtype)
    out = losses.sharded_log_prob(rows, weights, repeated, None, execution, softcap)
    return out.reshape(B, F, P, config.rank)


def component_rows(
    params: HeadParams,
    config: HeadConfig,
    h: jax.Array,  # [B, F, D]
    targets: jax.Array,  # [B, F, P] int32
) -> tuple[jax.Array, jax.Array]:
    """Every component's hidden states and targets, in the order [F, P, R]: rows [B, F P R, D] for
    the unembedding, and [B, F P R]. Not for `direct`, whose tables differ from row to row."""
    B, F, P = targets.shape
    z = jnp.stack([head.components(params, config, h, step) for step in range(P)], axis=2)
    repeated = jnp.broadcast_to(targets[..., None], (B, F, P, config.rank))
    return z.reshape(B, F * P * config.rank, h.shape[-1]), repeated.reshape(B, -1)


def draft_targets(params: HeadParams, targets: jax.Array) -> jax.Array:
    """Targets as indices of the draft vocabulary; the first that is outside it ends its future."""
    if "vocab" not in params:
        return targets
    ids = params["vocab"]["ids"]
    index = jnp.clip(jnp.searchsorted(ids, targets), 0, len(ids) - 1).astype(jnp.int32)
    known = (ids[index] == targets) & (targets >= 0)
    return jnp.where(jnp.cumprod(known, axis=-1, dtype=jnp.int32) > 0, index, -1)


def draft_execution(params: HeadParams, execution: losses.Execution) -> losses.Execution:
    """A draft vocabulary holds real tokens only: no column of its softmax is padding."""
    if "vocab" not in params:
        return execution
    return dataclasses.replace(execution, valid_vocab=None)


def head_loss(
    params: HeadParams,
    config: HeadConfig,
    options: LossConfig,
    model: ModelConfig,
    table: jax.Array,  # [V, D]
    states: jax.Array,  # [B, S, D], final-norm states of the rows
    futures: Futures,
    execution: losses.Execution,
    log_a: jax.Array | None = None,  # [B, F, P, R], where `component_log_probs` is known already
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum, over futures, of what is maximised; and sums for the metrics.

    Divided by the sum of the futures' weights it is minus the joint NLL, in nats per position, with
    discount 1, distill 0 and balance 0.
    """
    h = jnp.take_along_axis(states, futures.rows[..., None], axis=1)
    with jax.named_scope("head"):
        log_w = head.gate(params, h)
        log_A = transitions(params, config, h)
        targets = draft_targets(params, futures.targets)
        mask = targets >= 0
        if log_a is None:
            log_a = component_log_probs(
                params,
                config,
                h,
                targets,
                table,
                draft_execution(params, execution),
                model.logit_softcap,
            )
        beliefs = forward_beliefs(log_w, log_a, log_A, mask)
    totals = jax.nn.logsumexp(beliefs, axis=-1)
    log_q = jnp.where(mask, totals[..., 1:] - totals[..., :-1], 0.0)
    weights = futures.weights
    steps = jnp.arange(config.predicted, dtype=jnp.float32)
    discounts = jnp.expand_dims(options.discount**steps, (0, 1))
    per_step = weights[..., None] * mask
    total = (1.0 - options.distill) * jnp.sum(per_step * discounts * log_q)
    if options.distill:
        kl = teacher_kl(params, config, model, table, states, futures, beliefs, execution)
        total -= options.distill * jnp.sum(per_step * discounts * kl)
    count = jnp.sum(weights)
    mean_gate = jnp.sum(weights[..., None] * jnp.exp(log_w), axis=(0, 1)) / (count + _TINY)
    if options.balance:
        total -= options.balance * count * imbalance(mean_gate)
    posterior = jax.nn.log_softmax(beliefs[..., -1, :])
    sums = {
        "head_nll": -jnp.sum(per_step * log_q, axis=(0, 1)),  # [P]
        "head_count": jnp.sum(per_step, axis=(0, 1)),  # [P]
        "head_weight": count,
        "gate": count * mean_gate,  # [R]
        "gate_entropy": jnp.sum(weights * _entropy(log_w)),
        "posterior_entropy": jnp.sum(weights * _entropy(posterior)),
    }
    return total, sums


def imbalance(mean_gate: jax.Array) -> jax.Array:
    """KL(uniform | gate averaged over the batch): 0 in balance. Never per token, which would keep
    the gate from choosing."""
    return -math.log(len(mean_gate)) - jnp.mean(jnp.log(mean_gate + _TINY))


def _entropy(log_p: jax.Array) -> jax.Array:
    p = jnp.exp(log_p)
    return -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)


def drawn(key: jax.Array, futures: Futures, fraction: float) -> Futures:
    """A random `fraction` of each row's slots, taken from its real futures.

    Weights are divided by the chance of being drawn, so that sums keep their expectation.
    """
    B, F = futures.weights.shape
    count = max(1, math.ceil(fraction * F))
    if count >= F:
        return futures
    real = futures.weights > 0
    _, chosen = jax.lax.top_k(jnp.where(real, jax.random.uniform(key, (B, F)), -1.0), count)

    def take(x):
        return jnp.take_along_axis(x, jnp.expand_dims(chosen, tuple(range(2, x.ndim))), axis=1)

    available = jnp.sum(real, axis=1, keepdims=True)
    scale = jnp.maximum(available, count) / count
    picked = Futures(*map(take, futures))
    return picked._replace(weights=picked.weights * scale.astype(jnp.float32))


def teacher_kl(
    params: HeadParams,
    config: HeadConfig,
    model: ModelConfig,
    table: jax.Array,  # [V, D]
    states: jax.Array,  # [B, S, D]
    futures: Futures,
    beliefs: jax.Array,  # [B, F, P+1, R] from `forward_beliefs`
    execution: losses.Execution,
) -> jax.Array:
    """KL(p | q_s) [B, F, P] float32, p the model's own distribution at the row before each token.

    p is fixed: the head learns from the model, not the other way. A draft vocabulary leaves out the
    terms of tokens that it lacks. A mixture has no fused form, so logits are kept for a chunk of
    positions at a time and made again in the backward pass.
    """
    B, F, P = futures.targets.shape
    table = table.astype(states.dtype)
    own = jax.lax.stop_gradient(states)
    before = jnp.concatenate([futures.rows[..., None], futures.children[..., :-1]], axis=-1)
    options = {"softcap": model.logit_softcap, "valid_vocab": execution.valid_vocab}

    def chunk(xs):
        h, belief, rows = xs  # [B, f, D], [B, f, P, R], [B, f, P]
        found = []
        for step in range(P):
            teacher = jnp.take_along_axis(own, jnp.maximum(rows[..., step, None], 0), axis=1)
            log_p = _teacher_log_probs(params, model, table, teacher, execution.valid_vocab)
            logits = head.logits(params, config, h, step, table, **options)
            mixed = jax.nn.log_softmax(belief[..., step, :])[..., None] + jax.nn.log_softmax(logits)
            p = jnp.exp(log_p)
            # tokens that cannot occur have -inf on both sides, which no gradient may meet
            mixed = jnp.where((p > 0)[..., None, :], mixed, 0.0)
            log_q = jax.nn.logsumexp(mixed, axis=-2)
            found.append(jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1))
        return jnp.stack(found, axis=-1)

    h = jnp.take_along_axis(states, futures.rows[..., None], axis=1)
    size = max(1, min(F, _TEACHER_BYTES // (4 * B * (config.rank + 2) * table.shape[0])))
    pieces = -(-F // size)

    def split(x):
        padding = ((0, 0), (0, pieces * size - F)) + ((0, 0),) * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, padding).reshape(B, pieces, size, *x.shape[2:]), 1, 0)

    out = jax.lax.map(jax.checkpoint(chunk), (split(h), split(beliefs[..., :-1, :]), split(before)))
    return jnp.moveaxis(out, 0, 1).reshape(B, pieces * size, P)[:, :F]


def _teacher_log_probs(params, model, table, states, valid_vocab):
    """The model's log-probabilities of the tokens that the head can predict, constant."""
    logits = jnp.einsum("...d,vd->...v", states, table, preferred_element_type=jnp.float32)
    if model.logit_softcap is not None:
        logits = model.logit_softcap * jnp.tanh(logits / model.logit_softcap)
    if valid_vocab is not None:
        columns = jnp.expand_dims(jnp.arange(logits.shape[-1]), tuple(range(logits.ndim - 1)))
        logits = jnp.where(columns < valid_vocab, logits, -jnp.inf)
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(logits))
    return log_p[..., params["vocab"]["ids"]] if "vocab" in params else log_p


def trunk_states(
    model: ModelConfig, params: transformer.Params, batch: losses.Batch, execution: losses.Execution
) -> tuple[jax.Array, jax.Array]:
    """Hidden states [B, S, D] of the rows and the unembedding [V, D] in the compute dtype."""
    states = losses.forward(model, params, batch, execution)
    return states, transformer.unembedding(model, params).astype(states.dtype)
