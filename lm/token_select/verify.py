# SPDX-License-Identifier: Apache-2.0
"""Proof of what token selection claims: with k large enough it is dense attention, chunks of a
prompt are the prompt, a batch is its sequences, and every implementation picks the same tokens.

Logits are compared with those of one forward pass over whole texts, without any cache. Errors are
relative to the largest logit.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm import generate, transformer
from lm.config import ModelConfig, SamplingConfig
from lm.errors import UserError
from lm.long_context import chunks, context, decode, exact, lists
from lm.long_context.heads import Heads
from lm.long_context.policy import Dense, Policy
from lm.long_context.program import Held, Program
from lm.progress import say
from lm.token_select import select
from lm.token_select.config import SelectConfig
from lm.token_select.method import TokenSelect
from ops import dispatch

Params = transformer.Params
TOLERANCES = {"dense_error": 1e-4, "chunk_error": 1e-4, "ragged_error": 1e-4}
LEAST_OVERLAP = 0.99
_REUSE = 1e-6  # a selection is kept for any query that does not turn away from its own


@dataclasses.dataclass(frozen=True)
class Findings:
    """The largest deviations found."""

    dense_error: float  # k large enough, with and without reuse, against dense attention
    chunk_error: float  # dense chunks against the whole prompt
    ragged_error: float  # a batch, with selection, against each sequence alone
    selection_overlap: float  # smallest of any implementation's picks with the reference's
    overlaps: dict[str, float]  # of each implementation that serves here
    shadow_overlap: float | None  # of the 8-bit shadow's picks with the exact ones
    tokens: int  # of the longest text
    steps: int  # decode steps compared
    cut: int  # fewest candidates, at a longest text, that were not picked

    def problems(self, tolerance: float | None = None) -> list[str]:
        """What is beyond tolerance, in words; empty when all holds."""
        limits = {
            name: limit if tolerance is None else tolerance for name, limit in TOLERANCES.items()
        }
        found = [
            f"{name} {getattr(self, name):.3g} exceeds {limit:g}"
            for name, limit in limits.items()
            if not getattr(self, name) <= limit  # NaN too
        ]
        if not self.selection_overlap >= LEAST_OVERLAP:
            found.append(f"selection_overlap {self.selection_overlap:.4f} is below {LEAST_OVERLAP}")
        return found


def verify(
    model: ModelConfig,
    params: Params,
    config: SelectConfig,
    *,
    texts: Sequence[np.ndarray] = (),
    steps: int = 32,
    valid_vocab: int | None = None,
    implementation: str | None = None,
    seed: int = 0,
) -> Findings:
    """Runs every check.

    Args:
      texts: the last `steps` tokens of each are fed one by one; () takes four random ones, of which
        the longest is two and a half times what a step reads.
      implementation: of the ops, where they are not compared.

    Raises UserError for settings that do not fit the model.
    """
    if not texts:
        texts = random_texts(model, config, steps, valid_vocab, seed)
    params = generate.prepare(model, params)
    if min(map(len, texts)) <= steps:
        raise UserError(f"a text of {min(map(len, texts))} tokens leaves none before {steps} steps")
    policies = _policies(config, max(map(len, texts)))
    policies["select"].check(model, None, None)
    program = Program(model, SamplingConfig(), policies["select"], 0, None, implementation)
    slots = chunks.room([len(text) for text in texts], 0, config.chunk)[1]
    program = dataclasses.replace(program, capacity=slots)
    say(f"{len(texts)} texts of {min(map(len, texts))} to {max(map(len, texts))} tokens")
    wanted = [exact.logits(model, params, text, slots) for text in texts]

    def logits(name, texts, stepping=True):
        return _logits(program, params, policies[name], texts, steps, stepping)

    chunked, _ = logits("dense", texts, stepping=False)
    prompts = [one[: len(other)] for one, other in zip(wanted, chunked, strict=True)]
    whole, reused = (logits(name, texts)[0] for name in ("whole", "reused"))
    together, held = logits("select", texts)
    alone = [logits("select", [text])[0][0] for text in texts]
    counts = np.array([len(text) - steps for text in texts], np.int32)
    overlaps, shadow = _overlaps(program, held, counts, seed)
    longest = max(map(len, texts))
    return Findings(
        exact.error([*whole, *reused], [*wanted, *wanted]),
        exact.error(chunked, prompts),
        exact.error(together, alone),
        min(overlaps.values()),
        overlaps,
        shadow,
        longest,
        steps * len(texts),
        max(0, longest - config.budget),
    )


def _policies(config: SelectConfig, longest: int) -> dict[str, Policy]:
    whole = dataclasses.replace(
        config,
        k=longest,
        shortcut=False,
        coverage=0.0,
        reuse=0.0,
        reuse_prefill=False,
        guard_every=0,
        prefill="select",
    )
    plain = dataclasses.replace(config, guard_every=0)
    return {
        "dense": Dense(config.chunk, config.rope),
        "whole": TokenSelect(whole),
        "reused": TokenSelect(dataclasses.replace(whole, reuse=_REUSE)),
        "select": TokenSelect(plain),
    }


def random_texts(
    model: ModelConfig, config: SelectConfig, steps: int, valid_vocab: int | None, seed: int
) -> list[np.ndarray]:
    """Four texts: of two and a half budgets, just above one, below a chunk, and hardly a prompt."""
    rng = np.random.default_rng(seed)
    lengths = (5 * config.budget // 2, config.budget + 3, config.chunk // 2 + 1, 1)
    vocab = valid_vocab or model.vocab_size
    return [rng.integers(0, vocab, n + steps).astype(np.int32) for n in lengths]


def _logits(
    program: Program,
    params: Params,
    policy: Policy,
    texts: Sequence[np.ndarray],
    steps: int,
    stepping: bool,
) -> tuple[list[np.ndarray], Held]:
    """Logits [rows, V] of every text under a policy, its prompt in chunks, then (if `stepping`)
    step by step; and the cache with the prompts."""
    program = dataclasses.replace(program, policy=policy)
    lengths = np.array([len(text) - steps for text in texts], np.int32)
    held, found = decode.empty(program, len(texts)), [[] for _ in texts]
    tokens = np.zeros((len(texts), program.capacity), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    for start in range(0, int(lengths.max()), policy.chunk):
        count = np.clip(lengths - start, 0, policy.chunk)
        block = tokens[:, start : start + policy.chunk]
        logits, held = _chunk(program, params, block, held, np.int32(start), count)
        for text, n, mine, own in zip(texts, count, found, np.asarray(logits), strict=True):
            rows = exact.rows(len(text)) - start
            mine.append(own[rows[(rows >= 0) & (rows < n)]])
    if stepping:
        fed = np.stack([text[len(text) - steps :] for text in texts], axis=1)
        stepped = np.asarray(_steps(program, params, fed, held, lengths))  # [steps, B, V]
        for index, text in enumerate(texts):
            rows = exact.rows(len(text)) - lengths[index]
            found[index].append(stepped[rows[rows >= 0], index])
    return [np.concatenate(mine) for mine in found], held


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _chunk(program, params, block, held, start, rows):
    made = context.Selecting(
        held,
        start,
        rows,
        program.model,
        program.policy,
        prefill=True,
        implementation=program.implementation,
    )
    positions = start + jnp.arange(block.shape[1], dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(positions, block.shape)
    states, made = transformer.hidden(program.model, params, block, positions, made)
    return transformer.logits(program.model, params, states), made.state


@functools.partial(jax.jit, static_argnums=0)
def _steps(program, params, fed, held, starts):
    def step(carry, tokens):
        held, starts = carry
        active = jnp.ones(starts.shape, bool)
        logits, held = decode.step_logits(program, params, tokens, held, starts, active)
        return (held, starts + 1), logits

    return jax.lax.scan(step, (held, starts), fed)[1]


def _overlaps(
    program: Program, held: Held, lengths: np.ndarray, seed: int
) -> tuple[dict[str, float], float | None]:
    """Of every implementation's picks from these caches, for random queries, with the reference's;
    and of the shadow's with the exact ones."""
    config: SelectConfig = program.policy.config
    shape = (len(lengths), program.model.num_heads, program.model.head_dim)
    query = np.random.default_rng(seed).standard_normal(shape, np.float32)

    def picks(config, implementation):
        found = _picks(config, implementation, program.model, query, held.buffers, lengths)
        return jax.device_get(found)

    wanted = picks(config, "reference")
    names = dispatch.ORDER[dispatch.current_platform()]
    # where there are several, each op of the default takes the first that serves it
    found = {"default": _overlap(picks(config, None), wanted)} if len(names) > 1 else {}
    for name in names:
        try:
            found[name] = _overlap(picks(config, name), wanted)
        except dispatch.Unsupported as reason:
            say(f"{name} is not compared: {reason}")
    shadow = None
    if config.shadow:
        shadow = _overlap(wanted, picks(dataclasses.replace(config, shadow=""), "reference"))
    return found, shadow


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _picks(config, implementation, model, query, buffers, lengths):
    """Indices and counts of every layer."""
    begin, end = lists.bounds(lengths, config.n_init, config.n_local)

    def one(layer):
        top = select.choose(
            config,
            query.astype(model.dtype),
            buffers,
            layer,
            begin,
            end,
            scale=model.head_dim**-0.5 if config.scale_scores else 1.0,
            heads=Heads.of(config.head_weights, model.num_heads, layer),
            implementation=implementation,
        )
        return top.indices, top.counts

    return jax.lax.map(one, jnp.arange(model.num_layers, dtype=jnp.int32))


def _overlap(got: tuple[np.ndarray, ...], wanted: tuple[np.ndarray, ...]) -> float:
    """Smallest share of a list's tokens that the other has, too."""
    worst = 1.0
    lists = ((x.reshape(-1, x.shape[-1]), n.reshape(-1)) for x, n in (got, wanted))
    (slots, counts), (others, numbers) = lists
    for mine, n, other, m in zip(slots, counts, others, numbers, strict=True):
        if max(n, m):
            same = np.intersect1d(mine[:n], other[:m], assume_unique=True)
            worst = min(worst, len(same) / max(n, m))
    return float(worst)
