# SPDX-License-Identifier: Apache-2.0
"""Proof of what CP heads claim: the exact joint likelihood, its gradients, and decoding that
changes nothing.

The likelihood and the law of what is emitted are compared with an enumeration, on a small model
with a head of the same kind (transition and expander) as the one in question. Greedy output is
compared with plain generation token by token, on that model and head themselves.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm import generate, losses, transformer
from lm.config import ModelConfig, SamplingConfig
from lm.cp_heads import decode, head, law
from lm.cp_heads import losses as cp_losses
from lm.cp_heads.drafters import Heads, Target
from lm.cp_heads.head import HeadConfig, HeadParams
from lm.cp_heads.losses import Futures, LossConfig
from lm.progress import Progress, say
from lm.transformer import Params

TOLERANCES = {"loss_error": 1e-5, "grad_error": 1e-4, "law_error": 1e-6}
_SMALL = ModelConfig(
    vocab_size=3, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8
)
_BATCH = 128  # sequences decoded together
_NEW = 128  # tokens of each


@dataclasses.dataclass(frozen=True)
class Findings:
    """The largest deviations found."""

    loss_error: float  # of any future's log-likelihood, relative above 1 nat
    grad_error: float  # of any gradient, relative to the array's largest
    law_error: float  # of the probability of any emitted string
    greedy_mismatches: int  # tokens that differ from plain generation
    tokens_checked: int

    def problems(self) -> list[str]:
        """What is beyond tolerance, in words; empty when all holds."""
        found = [
            f"{name} {getattr(self, name):.3g} exceeds {limit:g}"
            for name, limit in TOLERANCES.items()
            if not getattr(self, name) <= limit  # NaN too
        ]
        if self.greedy_mismatches:
            found.append(
                f"{self.greedy_mismatches} of {self.tokens_checked} greedy tokens differ from "
                "plain generation"
            )
        return found


def verify(
    model: ModelConfig,
    params: Params,
    config: HeadConfig,
    weights: HeadParams,
    *,
    prompts: Sequence[np.ndarray] = (),
    tokens: int = 10_000,
    stop_ids: Sequence[int] = (),
    valid_vocab: int | None = None,
    implementation: str | None = None,
    seed: int = 0,
) -> Findings:
    """Runs every check. Prompts are repeated as often as needed; () takes random ones.

    At least `tokens` greedy tokens are compared, half of them from trees of drafts where the rank
    allows them; those come with stop tokens.

    Raises UserError for a head that does not fit the model.
    """
    head.check(config, model)
    small = small_head(config)
    loss_error, grad_error = likelihood_errors(small, seed)
    law_error = emission_error(small, seed)
    target = Target(model, SamplingConfig(max_new_tokens=_NEW), None, implementation, valid_vocab)
    drafters = [(Heads(config), ())]
    if config.rank > 1 and config.predicted > 1:
        drafters.append((Heads(config, chains=min(config.rank, 3)), stop_ids))
    count = -(-tokens // (_NEW * len(drafters)))
    count = 1 << (count - 1).bit_length()  # what the batch is padded to anyway
    wrong = checked = turn = 0
    while turn < len(drafters) or checked < tokens:  # stop tokens may end the texts of a turn early
        drafter, stops = drafters[turn] if turn < len(drafters) else drafters[0]
        texts = _prompts(prompts, target, count, seed + turn)
        found = greedy_mismatches(target, params, drafter, weights, texts, stops)
        wrong, checked, turn = wrong + found[0], checked + found[1], turn + 1
    return Findings(loss_error, grad_error, law_error, wrong, checked)


def small_head(config: HeadConfig) -> HeadConfig:
    """A head of the same kind that can be enumerated."""
    return dataclasses.replace(
        config,
        rank=min(config.rank, 3),
        predicted=min(config.predicted, 3),
        expander_rank=min(config.expander_rank, 3),
        draft_vocab=2 if config.draft_vocab else 0,
        noise=1.0,
    )


def likelihood_errors(config: HeadConfig, seed: int) -> tuple[float, float]:
    """Of `losses.head_loss` and of its gradients against sums over all paths of components."""
    params, table, states, futures = _problem(config, seed)
    options = LossConfig(mode="heads", balance=0.0)
    model = dataclasses.replace(_SMALL, vocab_size=len(table))

    def fused(params, table, states, weights):
        total, _ = cp_losses.head_loss(
            params,
            config,
            options,
            model,
            table,
            states,
            futures._replace(weights=weights),
            losses.Execution(),
        )
        return total

    def summed(params, table, states, weights):
        log_p = _log_joint(params, config, table, states[0], futures.targets[0])
        return jnp.sum(weights[0] * log_p)

    @jax.jit
    def gradients(*arguments):
        every = tuple(range(len(arguments)))
        return [jax.grad(f, every, allow_int=True)(*arguments) for f in (fused, summed)]

    arguments = (params, table, states, futures.weights)
    got, wanted = jax.device_get(gradients(*arguments))
    # the gradient of a future's weight is its log-likelihood
    loss = np.max(np.abs(got[3] - wanted[3]) / np.maximum(np.abs(wanted[3]), 1.0))
    errors = [
        np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-6)
        for a, b in zip(jax.tree.leaves(got[:3]), jax.tree.leaves(wanted[:3]), strict=True)
        if np.issubdtype(a.dtype, np.floating)  # not the draft vocabulary
    ]
    return float(loss), float(max(errors))


def _problem(config: HeadConfig, seed: int):
    """A head with large random parameters, a table, and every future, each at its own state."""
    V = _SMALL.vocab_size
    params = _random_head(config, seed)
    rng = np.random.default_rng(seed)
    # an end within the future: what follows is marginalised
    strings = list(itertools.product(range(V), repeat=config.predicted))
    targets = np.array(strings, np.int32).reshape(-1, config.predicted)
    targets[::3, -1] = -1
    if config.draft_vocab:
        targets = np.where(targets < config.draft_vocab, targets, 0)
    rows = np.arange(len(targets), dtype=np.int32)
    states = rng.normal(size=(1, len(rows), _SMALL.embed_dim)).astype(np.float32)
    table = rng.normal(size=(V, _SMALL.embed_dim)).astype(np.float32)
    weights = rng.uniform(0.5, 2, len(rows)).astype(np.float32)
    futures = Futures(
        *(jnp.asarray(x[None]) for x in (rows, targets, np.full_like(targets, -1), weights))
    )
    return params, jnp.asarray(table), jnp.asarray(states), futures


def _random_head(config: HeadConfig, seed: int) -> HeadParams:
    """Every parameter large and random: zeros and identities would hide mistakes."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), config, _SMALL))

    def leaf(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype)
        return jnp.arange(x.size, dtype=x.dtype)  # the draft vocabulary

    return jax.tree.map(leaf, shapes)


def _log_joint(params, config, table, states, targets):
    """log p(y) [F] of targets [F, P] (-1 past the end) at states [F, D], summed over every path."""
    steps = range(config.predicted)
    paths = np.array(list(itertools.product(range(config.rank), repeat=config.predicted)))
    total = head.gate(params, states)[:, paths[:, 0]]  # [F, paths]
    for step in steps:
        log_p = head.log_probs(params, config, states, step, table)
        seen = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[:, step, None, None], axis=2)
        seen = jnp.where(targets[:, step, None] >= 0, seen[..., 0], 0.0)  # [F, R]
        total = total + seen[:, paths[:, step]]
        log_a = head.transition(params, config, states, step)
        if log_a is not None:
            total = total + log_a[:, paths[:, step], paths[:, step + 1]]
        elif step + 1 < config.predicted:
            stays = paths[:, step] == paths[:, step + 1]
            total = total + jnp.where(stays, 0.0, -1e30)[None]
    return jax.nn.logsumexp(total, axis=1)


def random_params(model: ModelConfig, seed: int, size: float = 1.0) -> Params:
    """A model at random, of the scale of a trained one's layers rather than of a fresh one's."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        scale = size if x.ndim < 3 else 1 / np.sqrt(model.embed_dim)
        return jnp.asarray(scale * rng.standard_normal(x.shape, np.float32))

    return jax.tree.map(leaf, transformer.abstract(model)[1])


def emission_error(config: HeadConfig, seed: int) -> float:
    """Largest deviation of the enumerated law of what decoding emits from the model's own."""
    params = random_params(_SMALL, seed, size=0.6)
    weights = _random_head(config, seed)
    several = config.rank > 1 and config.predicted > 1
    prompt = np.array([1, 0], np.int32)
    target = Target(_SMALL, SamplingConfig(temperature=0.9))
    wanted = law.target_law(target, params, prompt, 3)
    worst = 0.0
    for chains in (1, 2) if several else (1,):
        got = law.emitted_law(target, params, Heads(config, chains), weights, prompt, 3)
        worst = max(worst, float(np.abs(got - wanted).max()))
    return worst


def greedy_mismatches(
    target: Target,
    params: Params,
    drafter: Heads,
    weights: HeadParams,
    prompts: Sequence[np.ndarray],
    stop_ids: Sequence[int],
) -> tuple[int, int]:
    """(tokens that differ from plain generation, tokens compared)."""
    params = generate.prepare(target.model, params)
    wrong = checked = 0
    total: decode.Statistics | None = None
    with Progress("greedy", len(prompts)) as progress:
        for first in range(0, len(prompts), _BATCH):
            batch = prompts[first : first + _BATCH]
            key = jax.random.key(0)
            wanted = generate.generate(
                target.model,
                params,
                batch,
                target.sampling,
                stop_ids,
                key,
                implementation=target.implementation,
                valid_vocab=target.valid_vocab,
            )
            got, found = decode.decode(target, params, drafter, weights, batch, stop_ids, key)
            total = found if total is None else total + found
            for one, other in zip(got, wanted, strict=True):
                same = min(len(one.tokens), len(other.tokens))
                wrong += int(np.sum(one.tokens[:same] != other.tokens[:same]))
                wrong += abs(len(one.tokens) - len(other.tokens)) + (one.stopped != other.stopped)
                checked += len(other.tokens)
            progress.advance(len(batch))
    per_call = total.summary()["tokens_per_call"]
    say(f"{checked} greedy tokens, {drafter.chains} chain(s), {per_call or 0:.2f} per trunk call")
    return wrong, checked


def _prompts(
    prompts: Sequence[np.ndarray], target: Target, count: int, seed: int
) -> list[np.ndarray]:
    """`count` prompts; random ones of 1 to 16 tokens where there are none."""
    if prompts:
        return [prompts[i % len(prompts)] for i in range(count)]
    rng = np.random.default_rng(seed)
    vocab = target.valid_vocab or target.model.vocab_size
    return [rng.integers(0, vocab, rng.integers(1, 17)).astype(np.int32) for _ in range(count)]
