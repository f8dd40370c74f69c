# SPDX-License-Identifier: Apache-2.0
"""The CP head: a mixture of R experts over the next P tokens, read off one hidden state.

    p(x[t+1..t+P] | h) = sum_c w_c(h) prod_s p_{c,s}(x[t+s+1] | h)          (arXiv 2410.17765)

Factor s (from 0) predicts the token s + 1 places after the position of h. Rank 1 is a set of
independent heads (arXiv 2404.19737). With a transition the component may change from one factor to
the next, which makes the mixture a hidden Markov model; the identity gives CP back.

Head parameters are a nested dict of arrays, beside the model's and never inside them:

    gate/kernel [D, R]
    expander/down [P, R, D, E]  expander/up [P, R, E, D]     low_rank: z = h + (h down) up
    expander/kernel [P, R, D, D]     full: z = h + h W; mlp: z = h + silu(h W)
    expander/table [P, R, V, D]      direct: own output matrices, z = h
    transition/logits [P-1, R, R]    constant and linear
    transition/kernel [P-1, D, R, R] linear
    vocab/ids [V'] int32, ascending: the draft vocabulary, when there is one (direct: V = V')
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ModelConfig, require_at_least_zero, require_choice, require_positive
from lm.errors import UserError

HeadParams = dict[str, Any]
TRANSITIONS = ("identity", "constant", "linear")
EXPANDERS = ("low_rank", "full", "mlp", "direct")
_STAY = 0.98  # of a transition's probability that the component keeps, at the start


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The shape of a CP head."""

    rank: int = 4  # R
    predicted: int = 4  # P tokens, the first of which is the ordinary next token
    transition: str = "identity"  # "identity" (CP), "constant" or "linear" in h (HMM)
    expander: str = "low_rank"  # "low_rank", "full", "mlp" or "direct"
    expander_rank: int = 64
    noise: float = 0.1  # of z at the start, relative to h: equal components would never separate
    draft_vocab: int = 0  # tokens that the head can predict; 0: all


def check(config: HeadConfig, model: ModelConfig) -> None:
    """Raises UserError, in one line, for a head that cannot be built on this model."""
    require_positive("head.rank", config.rank)
    require_positive("head.predicted", config.predicted)
    require_positive("head.expander_rank", config.expander_rank)
    require_choice("head.transition", config.transition, TRANSITIONS)
    require_choice("head.expander", config.expander, EXPANDERS)
    require_at_least_zero("head.noise", config.noise)
    if not 0 <= config.draft_vocab <= model.vocab_size:
        raise UserError(
            f"head.draft_vocab={config.draft_vocab} is not between 0 and the model's vocabulary "
            f"of {model.vocab_size}"
        )


def init(key: jax.Array, config: HeadConfig, model: ModelConfig) -> HeadParams:
    """Random float32 parameters: the gate is random and each component disturbed on its own.

    The draft vocabulary starts as the first tokens; `with_vocab` sets the frequent ones. Raises
    UserError as `check` does.
    """
    check(config, model)
    R, P, D, E = config.rank, config.predicted, model.embed_dim, config.expander_rank
    vocab = config.draft_vocab or model.vocab_size
    keys = jax.random.split(key, 3)

    def normal(key, *shape, stddev):
        return stddev * jax.random.normal(key, shape, jnp.float32)

    stddev = 1 / math.sqrt(D)  # final-norm states have entries of order 1
    params = {"gate": {"kernel": normal(keys[0], D, R, stddev=stddev)}}
    if config.expander == "low_rank":
        params["expander"] = {
            "down": normal(keys[1], P, R, D, E, stddev=stddev),
            "up": normal(keys[2], P, R, E, D, stddev=config.noise / math.sqrt(E)),
        }
    elif config.expander == "direct":
        params["expander"] = {"table": normal(keys[1], P, R, vocab, D, stddev=stddev)}
    else:
        stddev *= config.noise
        params["expander"] = {"kernel": normal(keys[1], P, R, D, D, stddev=stddev)}
    if config.transition != "identity":
        stay = math.log(_STAY / (1 - _STAY) * max(R - 1, 1))
        logits = jnp.broadcast_to(stay * jnp.eye(R, dtype=jnp.float32), (P - 1, R, R))
        params["transition"] = {"logits": logits}
        if config.transition == "linear":
            params["transition"]["kernel"] = jnp.zeros((P - 1, D, R, R), jnp.float32)
    if config.draft_vocab:
        params["vocab"] = {"ids": jnp.arange(config.draft_vocab, dtype=jnp.int32)}
    return params


def frequent(counts: np.ndarray, size: int) -> np.ndarray:
    """The ids [size] int32, ascending, of the tokens that were counted most often; counts [V]."""
    order = np.argsort(-np.asarray(counts, np.int64), kind="stable")
    return np.sort(order[:size]).astype(np.int32)


def with_vocab(params: HeadParams, counts: np.ndarray) -> HeadParams:
    """The parameters with the most frequent tokens as draft vocabulary; counts [V]."""
    ids = frequent(counts, len(params["vocab"]["ids"]))
    return {**params, "vocab": {"ids": jnp.asarray(ids)}}


def gate(params: HeadParams, h: jax.Array) -> jax.Array:
    """Log-probabilities [..., R] float32 of the components, from hidden states [..., D]."""
    kernel = params["gate"]["kernel"].astype(h.dtype)
    return jax.nn.log_softmax(
        jnp.einsum("...d,dr->...r", h, kernel, preferred_element_type=jnp.float32)
    )


def components(params: HeadParams, config: HeadConfig, h: jax.Array, step: int) -> jax.Array:
    """Hidden states [..., R, D], in h.dtype, of the components of factor `step`.

    `logits` says how they become tokens. Raises ValueError for a factor that the head lacks.
    """
    if not 0 <= step < config.predicted:
        raise ValueError(f"factor {step} of a head that predicts {config.predicted} tokens")
    weights = {name: leaf[step].astype(h.dtype) for name, leaf in params["expander"].items()}
    z = jnp.broadcast_to(h[..., None, :], (*h.shape[:-1], config.rank, h.shape[-1]))
    if config.expander == "direct":
        return z
    if config.expander == "low_rank":
        low = jnp.einsum("...d,rde->...re", h, weights["down"])
        return z + jnp.einsum("...re,red->...rd", low, weights["up"])
    moved = jnp.einsum("...d,rdk->...rk", h, weights["kernel"])
    return z + (jax.nn.silu(moved) if config.expander == "mlp" else moved)


def transition(params: HeadParams, config: HeadConfig, h: jax.Array, step: int) -> jax.Array | None:
    """log A [..., R, R] float32, rows normalised: from component i to j after factor `step`.

    None where components stay: for the identity, and after the last factor.
    """
    if config.transition == "identity" or step >= config.predicted - 1:
        return None
    logits = params["transition"]["logits"][step]
    logits = jnp.broadcast_to(logits, (*h.shape[:-1], *logits.shape))
    if config.transition == "linear":
        kernel = params["transition"]["kernel"][step].astype(h.dtype)
        logits = logits + jnp.einsum(
            "...d,dij->...ij", h, kernel, preferred_element_type=jnp.float32
        )
    return jax.nn.log_softmax(logits)


def output_table(params: HeadParams, config: HeadConfig, table: jax.Array, step: int) -> jax.Array:
    """What components are multiplied with: [V', D], or [R, V', D] where each has its own.

    `table` is the model's unembedding [V, D]; V' is the draft vocabulary, or V.
    """
    if config.expander == "direct":
        return params["expander"]["table"][step]
    return table[params["vocab"]["ids"]] if "vocab" in params else table


def logits(
    params: HeadParams,
    config: HeadConfig,
    h: jax.Array,
    step: int,
    table: jax.Array,
    *,
    softcap: float | None = None,
    valid_vocab: int | None = None,
) -> jax.Array:
    """Float32 logits [..., R, V'] over the draft vocabulary, in its order; -inf on padding tokens.

    Materialised: for decoding, evaluation and tests. Losses use `linear_log_prob`.
    """
    z = components(params, config, h, step)
    weights = output_table(params, config, table, step).astype(z.dtype)
    letters = "...rd,rvd->...rv" if weights.ndim == 3 else "...rd,vd->...rv"
    out = jnp.einsum(letters, z, weights, preferred_element_type=jnp.float32)
    if softcap is not None:
        out = softcap * jnp.tanh(out / softcap)
    if valid_vocab is not None and "vocab" not in params:
        ids = jnp.arange(out.shape[-1])
        valid = jnp.expand_dims(ids < valid_vocab, tuple(range(out.ndim - 1)))
        out = jnp.where(valid, out, -jnp.inf)
    return out


def log_probs(
    params: HeadParams,
    config: HeadConfig,
    h: jax.Array,
    step: int,
    table: jax.Array,
    *,
    softcap: float | None = None,
    valid_vocab: int | None = None,
) -> jax.Array:
    """Log-probabilities [..., R, V] float32 of each component of factor `step`.

    `table` is the model's unembedding [V, D]. Tokens outside the draft vocabulary, and from
    `valid_vocab` on, have -inf.
    """
    out = logits(params, config, h, step, table, softcap=softcap, valid_vocab=valid_vocab)
    return scatter(params, jax.nn.log_softmax(out), table.shape[0])


def scatter(params: HeadParams, values: jax.Array, vocab: int) -> jax.Array:
    """Log-probabilities [..., V'] over the draft vocabulary as [..., V]; -inf elsewhere."""
    if "vocab" not in params:
        return values
    out = jnp.full((*values.shape[:-1], vocab), -jnp.inf, values.dtype)
    return out.at[..., params["vocab"]["ids"]].set(values)
