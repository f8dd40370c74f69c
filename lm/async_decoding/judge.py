# SPDX-License-Identifier: Apache-2.0
"""Which of two answers is better, asked of a model: an endpoint, or a checkpoint at hand.

A judge sees every pair in both orders and gives the probability that the second answer is better,
weighted by its confidence: that of the tokens 1 and 2 where it says how likely they are, else 0,
0.5 or 1 by what it writes. `length_controlled` turns such judgements, or AlpacaEval's files of
them, into a win rate that longer answers do not inflate.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm import generate
from lm.async_decoding.assembly import Assembly
from lm.async_decoding.endpoint import Endpoint, Reply, Request
from lm.async_decoding.quality import Question
from lm.data.conversations import RecordReader
from lm.data.records import Malformed
from lm.errors import RunError, UserError
from lm.prompting import Speaker

_ASKED = """Two assistants answered the same request. Judge which answer serves the person better: \
right before wrong, complete before partial, consistent with itself, as long as it needs to be and \
no longer. The order of the answers means nothing.

[request]
{prompt}
[end of request]

[answer 1]
{first}
[end of answer 1]

[answer 2]
{second}
[end of answer 2]

Reply with the number of the better answer, 1 or 2, and nothing else."""

Comparison = tuple[str, str, str]  # (prompt, first answer, second answer)
Judge = Callable[[Sequence[Comparison]], list[float]]  # probabilities that the second is better


def prompt_of(comparison: Comparison) -> str:
    """What a judge is asked."""
    prompt, first, second = comparison
    return _ASKED.format(prompt=prompt, first=first, second=second)


def both_orders(ask: Judge) -> Judge:
    """A judge that sees each pair in both orders: one that prefers a place says 0.5."""

    def judge(comparisons: Sequence[Comparison]) -> list[float]:
        swapped = [(prompt, second, first) for prompt, first, second in comparisons]
        found = ask([*comparisons, *swapped])
        straight, back = found[: len(swapped)], found[len(swapped) :]
        return [(a + 1 - b) / 2 for a, b in zip(straight, back, strict=True)]

    return judge


def by_endpoint(endpoint: Endpoint) -> Judge:
    """A judge at an endpoint. It raises RunError where a comparison gets no reply."""

    def ask(comparisons: Sequence[Comparison]) -> list[float]:
        options = {"logprobs": True, "top_logprobs": 5}
        requests = [
            Request((("user", prompt_of(one)),), max_tokens=4, options=options)
            for one in comparisons
        ]
        replies = endpoint.fetch(requests)
        lost = sum(reply is None for reply in replies)
        if lost:
            raise RunError(f"{lost} of {len(replies)} judgements got no reply: run it again")
        return [second_of(reply) for reply in replies]

    return both_orders(ask)


def second_of(reply: Reply) -> float:
    """The probability of answer 2 in a judge's reply; 0.5 where it says neither."""
    for token in reply.top:
        shares = dict.fromkeys("12", 0.0)
        for text, log_prob in token.items():
            if text.strip() in shares:
                shares[text.strip()] += math.exp(log_prob)
        if sum(shares.values()) > 0:
            return shares["2"] / sum(shares.values())
    said = [letter for letter in reply.text if letter in "12"]
    return {"1": 0.0, "2": 1.0}[said[0]] if said else 0.5


def by_checkpoint(speaker: Speaker, batch_size: int = 8) -> Judge:
    """A judge that is a model at hand: the first tokens of "1" and "2" after the question."""
    choices = [int(speaker.tokenizer.encode(number)[0]) for number in "12"]
    if choices[0] == choices[1]:
        raise UserError("the judge's tokenizer does not tell 1 from 2")

    @functools.partial(jax.jit, static_argnums=3)
    def logits(params, tokens, lengths, capacity):
        out, _ = generate.prefill_logits(speaker.model, params, tokens, lengths, capacity)
        return out[:, np.array(choices)]

    def ask(comparisons: Sequence[Comparison]) -> list[float]:
        out: list[float] = []
        for start in range(0, len(comparisons), batch_size):
            group = comparisons[start : start + batch_size]
            prompts = [speaker.prompt(prompt_of(one)) for one in group]
            size = generate.bucket(max(map(len, prompts)))
            tokens, lengths, _ = generate.pad(prompts, None, size, None)
            found = np.asarray(logits(speaker.params, tokens, lengths, size), np.float64)
            out += (1 / (1 + np.exp(found[:, 0] - found[:, 1])))[: len(group)].tolist()
        return out

    return both_orders(ask)


def scorer(judge: Judge) -> Callable[[Question, Assembly], float]:
    """A judge as a scorer: the probability that an answer beats the question's reference."""

    def score(question: Question, assembly: Assembly) -> float:
        if not question.reference:
            raise UserError("a judge compares with references, and a question has none")
        return judge([(question.prompt, question.reference, assembly.text)])[0]

    return score


# --- win rates


@dataclasses.dataclass(frozen=True)
class Judgement:
    """How much the second answer is preferred to the baseline's, and how long the two are."""

    preference: float  # 0..1
    baseline_length: int  # characters
    length: int
    difficulty: float | None = None  # of the request, where it is known


@dataclasses.dataclass(frozen=True)
class WinRate:
    """In percent. slope: of the length term; `stderr` that of the plain rate."""

    plain: float
    length_controlled: float
    stderr: float
    slope: float
    n: int


def read_difficulties(path: str | os.PathLike[str]) -> dict[str, float]:
    """A JSON object that gives requests' difficulties by their texts. Raises UserError."""
    try:
        found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{os.fspath(path)}: {error}") from error
    if not isinstance(found, dict) or not all(type(x) in (int, float) for x in found.values()):
        raise UserError(f"{os.fspath(path)}: not an object from requests to numbers")
    return {text: float(value) for text, value in found.items()}


def read_judgements(
    path: str | os.PathLike[str], difficulties: Mapping[str, float] | None = None
) -> list[Judgement]:
    """AlpacaEval's annotations: records with output_1 (the baseline's), output_2 and `preference`,
    1 for the first to 2 for the second (0 counts as a draw there). Records without a preference are
    left out.

    difficulties: by the records' `instruction`, each of which must be there.

    Raises UserError and DataError.
    """

    def parse(record: Any, line: int) -> Judgement | None:
        del line
        if not isinstance(record, Mapping):
            raise Malformed("not an object")
        texts = [record.get(name) for name in ("output_1", "output_2")]
        if not all(isinstance(text, str) for text in texts):
            raise Malformed("output_1 and output_2 must be texts")
        preference = record.get("preference")
        if preference is None:
            return None
        if not isinstance(preference, int | float) or not (preference == 0 or 1 <= preference <= 2):
            raise Malformed(f"preference {preference!r} is not 0 or in 1..2")
        share = 0.5 if preference == 0 else preference - 1
        asked = record.get("instruction")
        if difficulties is not None and asked not in difficulties:
            raise Malformed(f"instruction {asked!r} has no difficulty")
        difficulty = None if difficulties is None else difficulties[asked]
        return Judgement(float(share), len(texts[0]), len(texts[1]), difficulty)

    found = [one for one in RecordReader(os.fspath(path), parse) if one is not None]
    if not found:
        raise UserError(f"{os.fspath(path)}: no record has a preference")
    return found


def length_controlled(judgements: Sequence[Judgement], ridge: float = 1e-3) -> WinRate:
    """The win rate, and the one at equal lengths (arXiv 2404.04475).

    There the probability that model m beats baseline b on request x is

        logistic(theta + phi tanh((len_m - len_b) / std(len_m - len_b)) + psi gamma_x),

    fitted to the judge's preferences by cross-entropy, and the length-controlled win rate is its
    mean over requests with the middle term set to 0. theta, phi and psi are fitted here, with a
    ridge on phi and psi for files that a line separates. gamma_x, the difficulty of a request, is
    fitted by the authors on all models of their leaderboard together: the term is there only if
    all judgements bring those values.
    """
    shares = np.array([one.preference for one in judgements], np.float64)
    apart = np.array([one.length - one.baseline_length for one in judgements], np.float64)
    spread = apart.std()
    columns = [np.ones(len(shares)), np.tanh(apart / spread) if spread else np.zeros(len(shares))]
    difficulty = [one.difficulty for one in judgements]
    if difficulty and None not in difficulty:
        columns.append(np.array(difficulty, np.float64))
    weights = _logistic(np.stack(columns, 1), shares, ridge)
    equal = np.stack([columns[0], np.zeros(len(shares)), *columns[2:]], 1)
    return WinRate(
        plain=100 * float(shares.mean()),
        length_controlled=100 * float(_sigmoid(equal @ weights).mean()),
        stderr=100 * float(shares.std(ddof=1) / math.sqrt(len(shares))) if len(shares) > 1 else 0.0,
        slope=float(weights[1]),
        n=len(shares),
    )


def _logistic(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """Weights of a logistic regression on shares in 0..1, by Newton's method; the first column's
    weight is held only as far as a unanimous file needs."""
    penalty = len(y) * ridge * np.eye(x.shape[1])
    penalty[0, 0] = 1e-6 * len(y)

    def loss(weights: np.ndarray) -> float:
        scores = x @ weights
        return float(
            (np.logaddexp(0, scores) - y * scores).sum() + 0.5 * weights @ penalty @ weights
        )

    weights = np.zeros(x.shape[1])
    for _ in range(100):
        expected = _sigmoid(x @ weights)
        gradient = x.T @ (expected - y) + penalty @ weights
        curvature = (x * (expected * (1 - expected))[:, None]).T @ x + penalty
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while loss(weights - size * step) > loss(weights) and size > 1e-6:
            size /= 2
        weights = weights - size * step
        if np.abs(step).max() * size < 1e-10:
            break
    return weights


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
