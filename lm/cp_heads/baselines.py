# SPDX-License-Identifier: Apache-2.0
"""Drafters that CP heads are compared with, on the same target and in the same loop.

`Hydra`: a sequential head (arXiv 2402.05109): step s reads the hidden state and the embeddings of
the known token and of all tokens drafted before it, so it conditions on drafted tokens directly
where a mixture does so through its component. Where drafts depend on more than a few discrete
modes it is the stronger drafter; its steps cannot run in parallel, and each needs the vocabulary's
matrix again.

    hydra/{s}/down [(s + 1) D, E]   hydra/{s}/up [E, D]     s = 1 .. P-1;  z = h + silu(x down) up

`DraftModel`: a smaller model of the same vocabulary with a cache of its own (arXiv 2211.17192).
Rank 1 of a CP head is the third, independent heads (arXiv 2404.19737, 2401.10774); decoding without
drafts, `drafters.Autoregressive`, the fourth.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lm import contexts, losses, train, transformer
from lm import sampling as draws
from lm.config import ModelConfig, SamplingConfig
from lm.cp_heads import head, training
from lm.cp_heads import losses as cp_losses
from lm.cp_heads.draft import Draft
from lm.cp_heads.drafters import Target
from lm.cp_heads.futures import FUTURE_FIELDS
from lm.cp_heads.head import HeadConfig
from lm.cp_heads.losses import Futures
from lm.errors import UserError
from lm.progress import Progress
from lm.setup import Setup
from lm.transformer import Params

Weights = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Hydra:
    """Drafts `predicted` - 1 tokens one after the other."""

    predicted: int  # P, as of a CP head: the first of these tokens is known
    width: int  # E
    chains: int = 1

    @property
    def length(self) -> int:
        return self.predicted - 1

    def check(self, target: Target) -> None:
        if min(self.predicted, self.width) < 1:
            raise UserError(f"a Hydra head of {self.predicted} tokens and width {self.width}")

    def start(self, target, weights, tokens, lengths, capacity):
        return ()

    def draft(self, target, params, weights, state, known, keys):
        seen = [_embedded(params, known.last[:, None], known.states.dtype)]
        tokens, laws = [], []
        for step in range(1, self.predicted):
            z = _step(weights, step, known.states[:, None], seen)[:, 0]
            logits = transformer.logits(target.model, params, z)
            logits = draws.masked_logits(logits, target.valid_vocab)
            token, law = _drawn(logits, target.sampling, keys, step)
            seen.append(_embedded(params, token[:, None], z.dtype))
            tokens.append(token)
            laws.append(law)
        return _draft(tokens, laws, target, known.last), state

    def keep(self, state, known, tokens, count):
        return state


def hydra_width(config: HeadConfig, model: ModelConfig, parameters: int) -> int:
    """The width at which a Hydra head for as many tokens has `parameters` numbers, or a few
    less."""
    rows = sum(step + 2 for step in range(1, config.predicted))
    return max(1, parameters // max(1, rows * model.embed_dim))


def init_hydra(key: jax.Array, hydra: Hydra, model: ModelConfig) -> Weights:
    """Random float32 parameters; z starts close to h."""
    D, E = model.embed_dim, hydra.width
    weights = {}
    for step in range(1, hydra.predicted):
        down, up = jax.random.split(jax.random.fold_in(key, step))
        inputs = (step + 1) * D
        weights[str(step)] = {
            "down": jax.random.normal(down, (inputs, E)) / math.sqrt(inputs),
            "up": 0.1 * jax.random.normal(up, (E, D)) / math.sqrt(E),
        }
    return weights


def hydra_objective(hydra: Hydra, model: ModelConfig, execution: losses.Execution):
    """A `train.Objective` for {"params": frozen model, "hydra": head} on rows with futures: next
    tokens from the true ones before them."""

    def objective(params, batch, key):
        del key  # nothing is drawn
        states, table = cp_losses.trunk_states(model, params["params"], batch, execution)
        futures = Futures(*(batch[name] for name in FUTURE_FIELDS))
        h = jnp.take_along_axis(states, futures.rows[..., None], axis=1)
        rows, targets = hydra_rows(hydra, params["hydra"], params["params"], h, futures.targets)
        log_prob = losses.sharded_log_prob(
            rows, table, targets, None, execution, model.logit_softcap
        )
        log_prob = log_prob.reshape(*h.shape[:2], hydra.length)
        total = jnp.sum(futures.weights[..., None] * log_prob, axis=(0, 1))  # [P - 1]
        weight = jnp.sum(futures.weights)
        return jnp.sum(total), {"weight": weight, "head_weight": weight, "head_nll": -total}

    return objective


def hydra_rows(
    hydra: Hydra,
    weights: Weights,
    params: Params,
    h: jax.Array,  # [B, F, D]
    targets: jax.Array,  # [B, F, P] int32, -1 past the end
) -> tuple[jax.Array, jax.Array]:
    """Every step's hidden states, given the true tokens before it, and targets, in the order
    [F, P - 1]: rows [B, F (P - 1), D] for the unembedding, and [B, F (P - 1)]."""
    B, F, D = h.shape
    mask = jnp.cumprod(targets >= 0, axis=-1, dtype=jnp.int32) > 0
    tokens = jnp.maximum(targets, 0)
    seen, rows = [], []
    for step in range(1, hydra.predicted):
        seen.append(_embedded(params, tokens[..., step - 1], h.dtype))
        rows.append(_step(weights, step, h, seen))
    wanted = jnp.where(mask, tokens, -1)[..., 1 : hydra.predicted]
    return jnp.stack(rows, axis=2).reshape(B, F * hydra.length, D), wanted.reshape(B, -1)


def train_hydra(
    resolved: Setup, params: Params, hydra: Hydra, steps: int, seed: int = 0
) -> tuple[Weights, list[float]]:
    """A head trained on the frozen model with the config's data, optimiser and batch size, and the
    loss of every step in nats per future. On one device; nothing is saved."""

    def made(key):
        return {"hydra": init_hydra(key, hydra, resolved.model)}

    execution = losses.Execution(
        None, resolved.config.train.implementation or None, "none", resolved.valid_vocab
    )
    objective = hydra_objective(hydra, resolved.model, execution)
    trained, found = train_beside(resolved, params, made, objective, hydra.predicted, steps, seed)
    return trained["hydra"], found


def train_head(
    resolved: Setup, params: Params, config: HeadConfig, steps: int, seed: int = 0
) -> tuple[Weights, list[float]]:
    """A CP head, rank 1 for instance, trained as `train_hydra` trains its own."""
    if config.draft_vocab:
        raise UserError("heads that a benchmark trains predict every token: head.draft_vocab=0")

    def made(key):
        return {"head": head.init(key, config, resolved.model)}

    execution = losses.Execution(
        None, resolved.config.train.implementation or None, "none", resolved.valid_vocab
    )
    options = dataclasses.replace(resolved.config.loss, mode="heads", lora_layers=0)
    objective = training.objective(resolved.model, config, options, execution)
    trained, found = train_beside(resolved, params, made, objective, config.predicted, steps, seed)
    return trained["head"], found


def train_beside(
    resolved: Setup,
    params: Params,
    made: Any,  # key -> what is trained, a dict beside "params"
    objective: train.Objective,
    predicted: int,
    steps: int,
    seed: int,
) -> tuple[Weights, list[float]]:
    """`steps` steps on the frozen model; float32 parameters, and the head's loss per future."""
    config = resolved.config
    loss = dataclasses.replace(config.loss, mode="heads", lora_layers=0)
    own = dataclasses.replace(
        config,
        head=dataclasses.replace(config.head, predicted=predicted),
        loss=loss,
        train=dataclasses.replace(config.train, steps=steps),
    )
    data = iter(training.data_of(dataclasses.replace(resolved, config=own)))
    optimizer = train.make_optimizer(config.optimizer, steps)
    step = train.make_step(objective, optimizer, own.train, resolved.model.dtype)
    step = jax.jit(step, donate_argnums=0)
    frozen = {"params": jax.tree.map(lambda x: x.astype(resolved.model.dtype), params)}
    state = train.init_state(jax.jit(made)(jax.random.key(seed)), optimizer, seed, None)
    found = []
    with Progress("baseline", steps) as progress:
        for _ in range(steps):
            state, sums = step(state, frozen, train.to_device(next(data), None))
            found.append((jnp.sum(sums["head_nll"]), sums["head_weight"]))
            progress.advance()
    return state.params, [float(a) / max(float(b), 1e-30) for a, b in jax.device_get(found)]


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """A smaller model drafts `length` tokens; weights are its parameters."""

    model: ModelConfig
    length: int
    chains: int = 1

    def check(self, target: Target) -> None:
        if self.length < 1:
            raise UserError(f"a draft model that drafts {self.length} tokens")
        if self.model.vocab_size != target.model.vocab_size:
            raise UserError(
                f"the draft model has {self.model.vocab_size} tokens, the target "
                f"{target.model.vocab_size}: they do not belong together"
            )

    def start(self, target, weights, tokens, lengths, capacity):
        cache = contexts.Cache.empty(self.model, tokens.shape[0], capacity)
        context = contexts.Prefill(cache, lengths, target.sharding, target.implementation)
        positions = jnp.broadcast_to(
            jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape
        )
        _, context = transformer.hidden(self.model, weights, tokens, positions, context)
        end = jnp.maximum(lengths, 1)[:, None] - 1
        return context.cache, jnp.take_along_axis(tokens, end, axis=1)[:, 0]

    def draft(self, target, params, weights, state, known, keys):
        cache, before = state
        # the token before the last one goes in again: after a draft that was kept whole its key
        # and value are missing
        feed = jnp.stack([before, known.last], axis=1)
        lengths = jnp.maximum(known.lengths - 1, 0)
        tokens, laws = [], []
        for step in range(1, self.length + 1):
            context = contexts.Decode(
                dataclasses.replace(cache, lengths=lengths), target.sharding, target.implementation
            )
            places = jnp.arange(feed.shape[1], dtype=jnp.int32)[None]
            states, context = transformer.hidden(
                self.model, weights, feed, lengths[:, None] + places, context
            )
            logits = transformer.logits(self.model, weights, states[:, -1])
            logits = draws.masked_logits(logits, target.valid_vocab)
            token, law = _drawn(logits, target.sampling, keys, step)
            cache, lengths, feed = context.cache, lengths + feed.shape[1], token[:, None]
            tokens.append(token)
            laws.append(law)
        return _draft(tokens, laws, target, known.last), (cache, before)

    def keep(self, state, known, tokens, count):
        cache, before = state
        fed = jnp.concatenate([known.last[:, None], tokens], axis=1)
        last = jnp.take_along_axis(fed, jnp.maximum(count, 1)[:, None] - 1, axis=1)[:, 0]
        return cache, jnp.where(count > 0, last, before)


def _step(weights: Weights, step: int, h: jax.Array, seen: list[jax.Array]) -> jax.Array:
    """Hidden states [B, F, D] of step `step` from h and the embeddings of the tokens before it."""
    own = weights[str(step)]
    x = jnp.concatenate([h, *seen[:step]], axis=-1)
    low = jnp.einsum("...d,de->...e", x, own["down"].astype(h.dtype))
    return h + jnp.einsum("...e,ed->...d", jax.nn.silu(low), own["up"].astype(h.dtype))


def _embedded(params: Params, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Embeddings [..., D], scaled to entries of order 1 as final-norm states have."""
    x = params["embed"]["table"][tokens].astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x.astype(dtype)


def _drawn(
    logits: jax.Array, sampling: SamplingConfig, keys: jax.Array, step: int
) -> tuple[jax.Array, jax.Array | None]:
    """A token [B] from logits [B, V], and what it was drawn from; None when greedy."""
    if draws.is_greedy(sampling):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), None
    law = draws.log_probs(logits, sampling)
    own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(own, law).astype(jnp.int32), law


def _draft(tokens, laws, target: Target, last: jax.Array) -> Draft:
    """One chain [B, 1, n] of these."""
    if not tokens:
        nothing = jnp.zeros((*last.shape, 1, 0), jnp.int32)
        law = jnp.zeros((*nothing.shape, target.model.vocab_size), jnp.float32)
        return Draft(nothing, None if draws.is_greedy(target.sampling) else law)
    chain = jnp.stack(tokens, axis=1)[:, None]
    return Draft(chain, None if laws[0] is None else jnp.stack(laws, axis=1)[:, None])
