# SPDX-License-Identifier: Apache-2.0
"""Offline acceptance against an exhaustive enumeration of speculative sampling for a tiny
vocabulary."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import sampling as draws
from lm import transformer
from lm.config import ModelConfig, SamplingConfig
from lm.cp_heads import decode, draft, drafters, head, offline
from lm.cp_heads.head import HeadConfig

V, P, R = 3, 3, 2
SAMPLING = SamplingConfig(temperature=1.0)
FOLLOW = jax.jit(offline.follow, static_argnums=3)
CASES = {
    "cp": (False, SAMPLING),
    "hmm": (True, SAMPLING),
    "filtered": (True, SamplingConfig(temperature=0.7, top_k=2)),
    "greedy": (True, SamplingConfig(temperature=0.0)),
}


def simplex(rng, *shape):
    return rng.dirichlet(np.full(shape[-1], 0.7), shape[:-1])


def filtered(law, sampling):
    """The law that is drawn from, as plain numpy."""
    if sampling.temperature == 0:
        return np.eye(len(law))[law.argmax()]
    law = law ** (1 / sampling.temperature)
    if sampling.top_k:
        law = np.where(law >= np.sort(law)[-sampling.top_k], law, 0)
    return law / law.sum()


class World:
    """A target p(next | last) and a head whose hidden state is the last token, as tables."""

    def __init__(self, hmm, sampling, seed=0):
        rng = np.random.default_rng(seed)
        raw = simplex(rng, V, V)
        self.sampling, self.hmm = sampling, hmm
        self.target = np.stack([filtered(law, sampling) for law in raw])  # [last, next]
        self.gate = simplex(rng, V, R)
        self.emit = simplex(rng, V, P, R, V)
        self.move = (
            simplex(rng, V, P - 1, R, R) if hmm else np.broadcast_to(np.eye(R), (V, 2, R, R))
        )

    def joint(self, h, tokens):
        """The head's probability of `tokens` after hidden state h, by summing over paths."""
        total = 0.0
        for path in itertools.product(range(R), repeat=len(tokens)):
            term = self.gate[h, path[0]]
            for s, token in enumerate(tokens):
                term *= self.emit[h, s, path[s], token]
                if s + 1 < len(tokens):
                    term *= self.move[h, s, path[s], path[s + 1]]
            total += term
        return total

    def conditional(self, h, before):
        law = np.array([self.joint(h, [*before, token]) for token in range(V)])
        return filtered(law / law.sum(), self.sampling)

    def cycle(self, h, last):
        """Yields (probability, emitted tokens) of every outcome of one cycle."""
        for drafted in itertools.product(range(V), repeat=P - 1):
            chance, context = 1.0, [last]
            laws = []
            for token in drafted:
                laws.append(self.conditional(h, context))
                chance *= laws[-1][token]
                context.append(token)
            if not chance:
                continue
            kept = []
            for token, q in zip(drafted, laws, strict=True):
                p = self.target[([last, *kept])[-1]]
                keep = min(1.0, p[token] / q[token])
                left = np.maximum(p - q, 0)
                if keep < 1:
                    for other in np.flatnonzero(left):
                        share = left[other] / left.sum()
                        yield chance * (1 - keep) * share, [*kept, int(other)]
                chance *= keep
                kept.append(token)
            for token, p in enumerate(self.target[kept[-1]]):
                yield chance * p, [*kept, token]

    def factors(self, h):
        """The same head at hidden states h [B], as decoding sees it."""

        def log(x):
            return jnp.asarray(np.log(x[h]), jnp.float32)

        moves = [log(self.move[:, s]) for s in range(P - 1)] if self.hmm else [None] * (P - 1)
        return draft.Factors(
            log_w=log(self.gate),
            log_p=tuple(log(self.emit[:, s]) for s in range(P)),
            log_a=(*moves, None),
            ids=None,
            vocab=V,
        )

    def steps(self, texts):
        """Steps [B, T, P] of texts [B, T]; past the end the last token goes on."""
        T = texts.shape[1]
        longer = np.concatenate([texts, np.repeat(texts[:, -1:], P, axis=1)], axis=1)
        with np.errstate(divide="ignore"):
            target = np.log(self.target).astype(np.float32)
        found = []
        for t in range(T):
            laws = jnp.asarray(target[longer[:, t : t + P]])
            after = jnp.asarray(longer[:, t + 1 : t + 1 + P])
            found.append(FOLLOW(self.factors(texts[:, t]), laws, after, self.sampling))
        return jax.tree.map(lambda *x: np.stack(x, axis=1), *found)

    def texts(self, first, length):
        """(texts [B, length], their probabilities given the first token)."""
        rest = np.array(list(itertools.product(range(V), repeat=length - 1)))
        texts = np.concatenate([np.full((len(rest), 1), first), rest], axis=1)
        chance = np.prod([self.target[texts[:, t], texts[:, t + 1]] for t in range(length - 1)], 0)
        return texts[chance > 0], chance[chance > 0]


@pytest.fixture(scope="module", params=CASES)
def world(request):
    return World(*CASES[request.param])


@pytest.fixture(scope="module")
def decoded(world):
    """All texts of 7 tokens that begin with token 1, and what the head does along them."""
    texts, chance = world.texts(1, 7)
    return texts, chance, world.steps(texts).accept


def test_expected_accepted(world):
    for h, last in [(0, 1), (1, 1), (2, 0)]:
        exact = sum(chance * (len(emitted) - 1) for chance, emitted in world.cycle(h, last))
        rest, chance = world.texts(last, P)
        texts = np.concatenate([np.full((len(rest), 1), h), rest], axis=1)
        steps = world.steps(texts)
        roots = np.zeros(texts.shape, bool)
        roots[:, 0] = True
        each = [
            offline.expected_accepted(steps.accept[[i]], steps.overlap[[i]], roots[[i]])
            for i in range(len(texts))
        ]
        assert np.dot(each, chance) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("predicted", [1, 2, 3])
def test_walk_gives_the_tokens_per_call_of_a_decoder(world, decoded, predicted):
    """Calls and tokens of all cycles that begin early enough, against every path of a decoder."""
    texts, chance, accept = decoded
    length, ones = texts.shape[1], np.ones(len(texts), int)
    walked = offline.walk(accept, length * ones, ones, predicted)
    calls = tokens = 0.0
    states = {(0, 1, x): p for x, p in enumerate(world.target[1])}
    for t in range(length - predicted):
        for (_, h, last), mass in [item for item in states.items() if item[0][0] == t]:
            calls += mass
            for p, emitted in shortened(world, h, last, predicted):
                tokens += mass * p * len(emitted)
                context = [last, *emitted]
                state = (t + len(emitted), context[-2], context[-1])
                states[state] = states.get(state, 0.0) + mass * p
    assert np.dot(walked.calls, chance) == pytest.approx(calls, abs=1e-5)
    assert np.dot(walked.tokens, chance) == pytest.approx(tokens, abs=1e-5)


def shortened(world, h, last, predicted):
    """A cycle that drafts predicted - 1 tokens: the target goes on after what was kept of them."""
    outcomes = {}
    for p, emitted in world.cycle(h, last):
        key = tuple(emitted[:predicted])
        outcomes[key] = outcomes.get(key, 0.0) + p
    return [(p, list(key)) for key, p in outcomes.items()]


def test_log_q_is_the_joint_of_the_head():
    world = World(True, SAMPLING)
    texts, _ = world.texts(0, P + 1)
    steps = world.steps(texts)
    exact = [np.log(world.joint(0, text[1:])) for text in texts]
    np.testing.assert_allclose(steps.log_q[:, 0].sum(-1), exact, rtol=1e-5)


def test_standard_error_is_that_of_a_ratio():
    rng = np.random.default_rng(0)
    calls = rng.uniform(5, 15, 4000)
    tokens = 2 * calls + rng.normal(0, 3, 4000)
    walked = offline.Walk(tokens, calls, np.zeros(0), np.zeros(0))
    assert walked.tokens_per_call == pytest.approx(2, abs=0.03)
    assert walked.stderr() == pytest.approx(3 / 10 / np.sqrt(4000), rel=0.1)
    assert np.isnan(offline.Walk(tokens[:1], calls[:1], np.zeros(0), np.zeros(0)).stderr())


MODEL = ModelConfig(
    vocab_size=16, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16
)


@pytest.fixture(scope="module")
def params():
    params = transformer.init(MODEL, jax.random.key(0))
    # flat tables would give a flat target, under which every draft is accepted
    return jax.tree.map(lambda x: 1.5 * x, params)


@pytest.mark.parametrize("draft_vocab", [0, 6])
def test_measure_is_the_head_along_the_text(params, draft_vocab):
    config = HeadConfig(
        rank=2, predicted=3, transition="linear", draft_vocab=draft_vocab, noise=1.0
    )
    weights = head.init(jax.random.key(1), config, MODEL)
    tokens = np.random.default_rng(2).integers(0, 12, (2, 9), np.int32)
    lengths = np.array([9, 5])
    arguments = (weights, config, MODEL, params, tokens, lengths, SAMPLING)
    whole, exists = offline.measure(*arguments, valid_vocab=12)
    steps, _ = offline.measure(*arguments, valid_vocab=12, chunk_bytes=1)
    steps, whole, exists = jax.device_get((steps, whole, exists))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, steps)
    assert exists.sum(axis=(1, 2)).tolist() == [8 + 7 + 6, 4 + 3 + 2]

    # the same for one row at a time, with what follows it
    states = offline._states(MODEL, None, params, tokens, lengths)
    laws = draws.log_probs(transformer.logits(MODEL, params, states), SAMPLING, 12)
    table = transformer.unembedding(MODEL, params)
    rows = np.array([(0, 0), (0, 5), (1, 1)])
    windows = rows[:, :1], rows[:, 1:] + np.arange(3)
    factors = draft.factors(weights, config, MODEL, states[rows[:, 0], rows[:, 1]], table, 12)
    alone = FOLLOW(factors, laws[windows], tokens[windows[0], windows[1] + 1], SAMPLING)
    for got, expected in zip(steps, alone, strict=True):
        np.testing.assert_allclose(got[rows[:, 0], rows[:, 1]], expected, atol=1e-5)
    assert np.isneginf(steps.log_q[exists]).any() == bool(draft_vocab)
    assert (steps.accept[exists] < 0.99).any()


def test_greedy_walk_counts_the_cycles_of_the_decoder(params):
    config = HeadConfig(rank=2, predicted=3, noise=0.3)
    weights = head.init(jax.random.key(1), config, MODEL)
    greedy, new, start = SamplingConfig(max_new_tokens=24), 24, 4
    prompts = list(np.random.default_rng(5).integers(0, 16, (3, start), np.int32))
    target = drafters.Target(MODEL, greedy)
    _, counted = decode.decode(
        target, params, drafters.Heads(config), weights, prompts, (), jax.random.key(0)
    )
    longer = drafters.Target(MODEL, SamplingConfig(max_new_tokens=new + 4))
    texts, _ = decode.decode(
        longer, params, drafters.Autoregressive(), {}, prompts, (), jax.random.key(0)
    )
    tokens = np.stack([np.append(p, t.tokens) for p, t in zip(prompts, texts, strict=True)])
    # cycles of the decoder begin while fewer than `new` tokens are out
    lengths = np.full(3, start + new - 2 + config.predicted)
    steps, _ = offline.measure(weights, config, MODEL, params, tokens, lengths, greedy)
    walked = offline.walk(np.asarray(steps.accept), lengths, np.full(3, start))
    cycles = counted.kept
    assert walked.calls.tolist() == cycles.sum(axis=1).tolist()
    assert walked.tokens.tolist() == (cycles @ np.arange(1, config.predicted + 1)).tolist()
    assert 0 < cycles[:, 1:].sum() < cycles.sum()
