# SPDX-License-Identifier: Apache-2.0
"""What was read, and what it was good for: the picked tokens of every step and layer with their
votes, and how far the next token's law moves when some of what was picked is left out."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import generate, sampling
from lm.config import ModelConfig, SamplingConfig
from lm.errors import UserError
from lm.sharding import Sharding
from lm.token_select import decode
from lm.token_select.config import SelectConfig
from lm.token_select.context import Held
from lm.token_select.decode import LoopState, Program
from lm.token_select.method import TokenSelect

Params = decode.Params


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """What the layers picked for one token; the first and last tokens are read besides."""

    token: int  # the one that came out
    total: int  # tokens there were when it was drawn
    kept: list[np.ndarray]  # per layer [n] int32 slots, ascending; per KV head [K, n], -1 past end
    votes: list[np.ndarray]  # as kept, float32


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """A text and where every token of it came from."""

    prompt: np.ndarray  # [n] int32
    tokens: np.ndarray  # [m] int32
    stopped: bool
    steps: list[Step]  # one per token; the first one's is that of the prompt's last chunk

    def rows(self) -> list[dict[str, Any]]:
        """JSON-ready: a row per step and layer with `step`, `layer`, `token`, `total`, `kept` and
        `votes`."""
        return [
            {
                "step": number,
                "layer": layer,
                "token": step.token,
                "total": step.total,
                "kept": kept.tolist(),
                "votes": [float(f"{x:.6g}") for x in votes.ravel()]
                if votes.ndim == 1
                else votes.tolist(),
            }
            for number, step in enumerate(self.steps)
            for layer, (kept, votes) in enumerate(zip(step.kept, step.votes, strict=True))
        ]

    def heat(self) -> np.ndarray:
        """[steps, tokens] float32: the share of layers (and KV heads) that picked the token."""
        width = len(self.prompt) + len(self.tokens)
        heat = np.zeros((len(self.steps), width), np.float32)
        for row, step in zip(heat, self.steps, strict=True):
            lists = [one for kept in step.kept for one in np.atleast_2d(kept)]
            for slots in lists:
                row[slots[slots >= 0]] += 1 / len(lists)
        return heat


def explain(
    model: ModelConfig,
    params: Params,
    prompt: np.ndarray,
    settings: SamplingConfig,
    select: SelectConfig,
    stop_ids: Sequence[int],
    key: jax.Array,
    **options: Any,
) -> Explanation:
    """Continues one prompt and records every step; options are those of `decode.stream`.

    Scores even what would be read anyway, so that every token has its vote.
    """
    policy = TokenSelect(select, record=True)
    options = {**options, "chunk": 1}
    tokens: list[int] = []
    steps: list[Step] = []
    stopped = False
    pieces = decode.stream(model, params, [prompt], settings, policy, stop_ids, key, **options)
    for (piece,), found in pieces:
        stopped = piece.stopped
        if not len(piece.tokens):
            continue
        kept, votes = _kept(found.policy)
        steps.append(Step(int(piece.tokens[0]), len(prompt) + len(tokens), kept, votes))
        tokens += piece.tokens.tolist()
    return Explanation(prompt, np.array(tokens, np.int32), stopped, steps)


def _kept(found: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per layer the picked slots and votes of the one sequence."""
    names = ("kept", "votes", "kept_count")
    slots, votes, counts = (found[name][:, 0] for name in names)
    if slots.ndim == 2:
        pairs = [(s[:n], v[:n]) for s, v, n in zip(slots, votes, counts, strict=True)]
    else:
        valid = np.arange(slots.shape[-1]) < counts[..., None]
        longest = counts.max(axis=1)
        slots = np.where(valid, slots, -1)
        pairs = [(s[:, :n], v[:, :n]) for s, v, n in zip(slots, votes, longest, strict=True)]
    return [s for s, _ in pairs], [v for _, v in pairs]


@dataclasses.dataclass(frozen=True, eq=False)
class Effects:
    """What leaving out each span does to the law of one token; n spans."""

    token: int  # the most likely one with all that was picked
    kl: np.ndarray  # [n] float32 nats: KL(all || without the span)
    log_prob: np.ndarray  # [n] float32: change of that token's log-probability
    largest: np.ndarray  # [n] float32: largest change of a logit
    best: np.ndarray  # [n] int32: the most likely token without the span


def effects(
    model: ModelConfig,
    params: Params,
    prompt: np.ndarray,
    settings: SamplingConfig,
    select: SelectConfig,
    key: jax.Array,
    spans: np.ndarray,  # [n, 2] int32: slots from .. to
    *,
    after: int = 0,
    sharding: Sharding | None = None,
    implementation: str | None = None,
    valid_vocab: int | None = None,
) -> Effects:
    """Leaves out one span at a time, in all layers, where it had been picked; what else is read
    keeps its position, and earlier steps stay as they were.

    Args:
      after: so many tokens are generated first; 0 looks at the first one, which the prompt's last
        token then selects for by itself rather than with its chunk.

    Raises:
      UserError: an empty or inverted span, a prompt of a single token with after=0, or fewer than
        `after` + 1 new tokens asked for.
    """
    spans = np.asarray(spans, np.int32).reshape(-1, 2)
    if not len(spans) or np.any(spans[:, 0] >= spans[:, 1]) or np.any(spans < 0):
        raise UserError("spans must be pairs from < to of positions in the text")
    if after >= settings.max_new_tokens:
        raise UserError(f"after={after} needs more than {settings.max_new_tokens} new tokens")
    if not after and len(prompt) < 2:
        raise UserError("the first token's effects need a prompt of at least two tokens")
    policy = TokenSelect(select, record=True)  # the program of `explain`
    program = Program(model, settings, policy, 0, sharding, implementation, valid_vocab)
    first = prompt if after else prompt[:-1]
    program, arguments = decode.request(program, [first], (), key)
    params = generate.prepare(model, params)
    state = decode.prefill(program, params, *arguments)
    if after:
        state = decode.advance(program, params, state, arguments[-2], after)
    else:
        last = jnp.full_like(state.last, int(prompt[-1]))
        state = dataclasses.replace(state, last=last)
    logits, without = jax.device_get(_without(program, params, state, jnp.asarray(spans)))
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x, axis=-1)) for x in (logits, without))
    real = np.isfinite(log_p)
    token = int(np.argmax(logits))
    with np.errstate(invalid="ignore"):  # what is no token of the vocabulary is -inf in both
        change = np.where(real, log_q - log_p, 0.0)
        shift = np.where(real, without - logits, 0.0)
    return Effects(
        token,
        -np.sum(np.exp(log_p) * change, axis=-1),
        log_q[:, token] - log_p[0, token],
        np.max(np.abs(shift), axis=-1),
        np.argmax(without, axis=-1).astype(np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def _without(
    program: Program, params: Params, state: LoopState, spans: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits of the next step, [1, V] float32, and without each span, [n, V]."""
    B = len(state.done)
    held = Held(state.cache.buffers, state.policy, state.reads)
    step = functools.partial(
        decode.step_logits, program, params, state.last, held, state.cache.lengths, ~state.done
    )

    def one(span):
        logits, _ = step(jnp.broadcast_to(span[None], (B, 2)))
        return sampling.masked_logits(logits[0], program.valid_vocab)

    nothing = jnp.zeros((1, 2), spans.dtype)
    logits = jax.lax.map(one, jnp.concatenate([nothing, spans]))
    return logits[:1], logits[1:]
