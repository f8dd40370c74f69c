# SPDX-License-Identifier: Apache-2.0
"""A target that drafts several tokens a pass drafts what one pass after the other says, from the
same kept entries; and its drafts serve the methods that need nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import contexts, sharding, transformer
from lm.config import MeshConfig, ModelConfig, SamplingConfig
from lm.draft_inference import speculate
from lm.draft_inference.method import Drafted
from lm.draft_inference.methods import VOTED, WATCHING
from lm.draft_inference.proposals import InBlocks, Proposals
from lm.draft_inference.speckv import SpecKV
from lm.errors import UserError
from lm.long_context import decode
from lm.long_context.eviction import layer_major
from lm.long_context.eviction.snapkv import SnapKV
from lm.long_context.program import Program
from tests.lm.draft_inference.small import methods
from tests.lm.long_context.small import GREEDY, MODEL, assert_same, dense, params, prompts, run

V, N, TOKENS = MODEL.vocab_size, 3, 10  # 3 passes give 12 tokens
PASSES = []


@dataclasses.dataclass(frozen=True)
class RunnersUp:
    """The model's next best tokens, moved on by the token that is known."""

    length: int = N

    def check(self, model: ModelConfig) -> None:
        if model.vocab_size != V:
            raise UserError(f"for {V} tokens")

    def __call__(self, params, weights, states, last, sampling, keys):
        jax.debug.callback(lambda: PASSES.append(1))
        _, best = jax.lax.top_k(transformer.logits(MODEL, params, states), N + 1)
        return (best[:, 1:] + last[:, None] + weights["shift"]) % V


def block(logits, shift=5):
    """The same by hand: [B, 1 + n] of logits [B, V]."""
    best = np.argsort(-np.asarray(logits), axis=1, kind="stable")[:, : N + 1]
    return np.concatenate([best[:, :1], (best[:, 1:] + best[:, :1] + shift) % V], axis=1)


@functools.cache
def proposals():
    return Proposals(RunnersUp(), {"shift": jnp.int32(5)}, "heads:test", "0123456789abcdefgh")


def snapkv(budget):
    return SnapKV(budget, 6, 3)


def drafted(budget, texts=None, stops=(), tokens=TOKENS, indices=None):
    """(tokens, counts) of the drafter."""
    sampling = dataclasses.replace(GREEDY, max_new_tokens=tokens)
    program = Program(MODEL, sampling, snapkv(budget))
    texts = prompts() if texts is None else texts
    made = decode.request(program, texts, stops, jax.random.key(0), indices=indices)
    found = InBlocks(snapkv(budget), proposals()).look(made[0], params(), made[1], tokens, None)
    assert found.importance is found.cache is None
    return np.asarray(found.tokens), np.asarray(found.counts)


def test_full_budgets_draft_by_the_states_of_a_dense_pass():
    """Every block from one forward pass over all of the text before it."""
    PASSES.clear()
    got, counts = drafted(64)
    jax.effects_barrier()
    assert len(PASSES) == 3  # not 10
    assert counts.tolist() == [TOKENS] * 4

    @jax.jit
    def after(tokens, lengths):
        context = contexts.Prefill(contexts.Cache.empty(MODEL, 4, 128), lengths)
        places = jnp.broadcast_to(jnp.arange(80, dtype=jnp.int32)[None], (4, 80))
        states, _ = transformer.hidden(MODEL, params(), tokens, places, context)
        last = jnp.take_along_axis(states, lengths[:, None, None] - 1, axis=1)[:, 0]
        return transformer.logits(MODEL, params(), last)

    texts = [list(prompt) for prompt in prompts()]
    for _ in range(3):
        padded = np.array([text + [0] * (80 - len(text)) for text in texts], np.int32)
        made = block(after(padded, np.array([len(text) for text in texts], np.int32)))
        texts = [text + row.tolist() for text, row in zip(texts, made, strict=True)]
    for row, text, prompt in zip(got, texts, prompts(), strict=True):
        assert row.tolist() == text[len(prompt) : len(prompt) + TOKENS]


def test_a_block_fed_at_once_is_its_tokens_fed_in_turn():
    """Behind the entries that SnapKV keeps, which are not all."""
    got, _ = drafted(24)
    assert (got != drafted(64)[0]).any()
    policy = snapkv(24)
    program, request = decode.request(Program(MODEL, GREEDY, policy), prompts(), (), None)
    prefill = jax.jit(layer_major.prefill, static_argnums=0)
    step = jax.jit(decode.step_logits, static_argnums=0)
    logits, held = prefill(program, params(), request.tokens, request.lengths, None)
    starts, active, made = jnp.asarray(request.lengths), jnp.ones(4, bool), []
    for _ in range(3):
        for token in block(logits).T:
            made.append(token)
            fed = jnp.asarray(token, jnp.int32)
            logits, held = step(program, params(), fed, held, starts, active)
            starts = starts + 1
    np.testing.assert_array_equal(got, np.stack(made, axis=1)[:, :TOKENS])


def test_a_draft_knows_nothing_of_the_rest_of_the_batch():
    got, _ = drafted(24)
    for texts in ([prompts()[1]], [prompts()[3], prompts()[2][:20], prompts()[1]]):
        again, counts = drafted(24, texts)
        assert counts[: len(texts)].tolist() == [TOKENS] * len(texts)
        assert counts[len(texts) :].tolist() == [0] * (len(counts) - len(texts))
        np.testing.assert_array_equal(again[len(texts) - 1], got[1])


def test_four_devices_draft_as_one():
    split = sharding.make(MeshConfig(data=2, fsdp=1, tensor=2), MODEL)
    program = Program(MODEL, GREEDY, snapkv(24), sharding=split)
    program, request = decode.request(program, prompts(), (), jax.random.key(0))
    weights = jax.device_put(params(), split.params(params()))
    found = InBlocks(snapkv(24), proposals()).look(program, weights, request, TOKENS, None)
    np.testing.assert_array_equal(found.tokens, drafted(24)[0])


def test_an_end_of_text_ends_a_draft():
    """In a block's midst, in its first token, and in what is cut off; all ends are in the first
    two blocks of one prompt alone, which then takes two passes."""
    plain, _ = drafted(24)
    stops = (int(plain[1, 2]), int(plain[3, 4]))
    got, counts = drafted(24, stops=stops)
    assert counts[1] <= 3
    assert counts[3] <= 5
    for row, other, n in zip(plain.tolist(), got.tolist(), counts, strict=True):
        ends = [place for place, token in enumerate(row) if token in stops]
        assert n == (ends[0] + 1 if ends else TOKENS)
        assert other[:n] == row[:n]
    PASSES.clear()
    _, counts = drafted(24, [prompts()[1]], stops=(int(plain[1, 5]),))
    jax.effects_barrier()
    assert len(PASSES) == -(-counts[0] // 4) < 3


@pytest.mark.parametrize("name", VOTED)
def test_a_full_budget_is_dense_decoding(name):
    table = dataclasses.replace(methods(columns=64, lookahead=6), draft=None, proposals=proposals())
    method = table.make(name, 60)
    stops = (int(dense()[1].tokens[7]),)
    got, found = run(method, stops=stops)
    assert_same(got, dense(stops=stops))
    assert any(g.stopped for g in got)
    assert found.policy["kept"].max() == 59  # one is fed again
    if name == "speckv":
        again, verified = speculate.generations(
            MODEL, params(), prompts(), GREEDY, method, stops, jax.random.key(0)
        )
        assert_same(again, got)
        # the first of a block is the target's own
        assert (verified.accepted >= 1).sum() >= 3
        assert verified.drafted.max() == 6


def test_no_tokens_take_no_pass():
    PASSES.clear()
    table = dataclasses.replace(methods(lookahead=0), draft=None, proposals=proposals())
    method = table.make("speckv", 40)
    assert method.tokens(GREEDY) == 0
    made = decode.request(Program(MODEL, GREEDY, method), prompts(), (), jax.random.key(0))
    found = method.look(made[0], params(), made[1]).lookahead
    assert found.tokens.shape == (4, 0)
    assert found.counts.tolist() == [0] * 4
    jax.effects_barrier()
    assert not PASSES


def test_refusals():
    table = dataclasses.replace(methods(), draft=None, proposals=proposals())
    drafter = table.drafter(40)
    assert drafter.policy.budget == 40
    assert repr(proposals()) == "Proposals(0123456789abcdef, 3)"
    for name in WATCHING:
        with pytest.raises(UserError, match=f"{name} chooses by a draft's attention") as caught:
            table.make(name, 40)
        assert "\n" not in str(caught.value)
    program, request = decode.request(Program(MODEL, GREEDY, SpecKV(40)), prompts(), (), None)
    watch = methods().make("specpc", 40).compressor.watch(2)
    for watched, room, message in ((watch, 0, "nothing is seen of"), (None, 9, "propose once")):
        with pytest.raises(UserError, match=message):
            drafter.look(program, params(), request, 4, watched, room)
    other = dataclasses.replace(MODEL, vocab_size=128)
    with pytest.raises(UserError, match="for 64 tokens"):
        Drafted(drafter, SpecKV(40)).check(other, None, None)


def test_drawn_drafts_follow_their_keys():
    sampling = SamplingConfig(temperature=1.5, max_new_tokens=TOKENS)
    program, request = decode.request(
        Program(MODEL, sampling, snapkv(24)), prompts(), (), jax.random.key(0)
    )
    drafter = InBlocks(snapkv(24), proposals())
    made = []
    for key in (0, 1, 0):
        given = request._replace(key=jax.random.key(key))
        made.append(np.asarray(drafter.look(program, params(), given, TOKENS, None).tokens))
    np.testing.assert_array_equal(made[0], made[2])
    first = [x[:, :1] for x in made]
    assert (first[0] != first[1]).any()
