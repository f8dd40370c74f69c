# SPDX-License-Identifier: Apache-2.0
"""Drafts change the steps, and nothing else: text, logits, and what the pool holds."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from lm.async_decoding import critical_path, drafting, threads, verify_pool
from lm.async_decoding.composed import Composition
from lm.async_decoding.drafting import Drafting
from tests.lm.async_decoding.composed_programs import MODEL, PROMPT, SPEAKER, Run, answer, without

PROGRAMS = [
    dataclasses.replace(answer(seed, 4), prompt=PROMPT[:n])
    for seed, n in ((3, 20), (8, 11), (11, 17))
]

RULES = threads.Rules(13, 320, "predicted")


@dataclasses.dataclass(frozen=True)
class Table:
    """What follows a token, and what follows that, by a table [V] of tokens."""

    length: int = 2

    def __call__(self, params, weights, states, last):
        found = []
        for _ in range(self.length):
            last = weights[last]
            found.append(last)
        return jnp.stack(found, axis=-1)


def successors(lines, wrong: float) -> np.ndarray:
    """What comes after each token in these lines, a share of it wrong."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, 256, MODEL.vocab_size).astype(np.int32)
    for line in lines:
        for token, after in itertools.pairwise(line):
            if rng.random() >= wrong:
                table[token] = after
    return table


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(static, proposer, params, weights, known, state, script):
    choose = verify_pool.forcing(static, script)
    return drafting.step(static, proposer, params, weights, known, state, choose)


def advanced(run, table):
    """A step of drafts: what was fed, how many of each row were kept, and the logits."""
    given = SPEAKER.params, table, run.known, run.state, run.script
    run.state, found = step(run.static, run.composition.proposer, *given)
    return jax.device_get(found)


def test_what_is_kept_is_what_the_decoder_writes():
    """Programs of all kinds: logits after each kept token against every thread as one sequence."""
    lines = [[program.main, *program.blocks] for program in PROGRAMS]
    table = successors(itertools.chain.from_iterable(lines), wrong=0.3)
    run = Run.begun(Drafting(Table()), PROGRAMS, rules=RULES)
    expected = [without(program, ()) for program in PROGRAMS]
    mains = [len(program.prompt) for program in PROGRAMS]
    kept = refused = 0
    while not run.finished():
        done = np.asarray(run.state.threads.done)
        indices = np.asarray(run.state.threads.rows.fed)
        fed, count, logits = advanced(run, table)
        for b, row in np.argwhere(fed.threads[:, :, 0] >= 0).tolist():
            assert not done[b]
            owner, taken = int(fed.threads[b, row, 0]), int(count[b, row])
            for j in range(taken):
                name = (owner, int(indices[b, row]) + j if owner else mains[b] + j)
                np.testing.assert_allclose(expected[b][name], logits[b, row, j], rtol=0, atol=2e-5)
            kept += taken - 1
            refused += int((fed.threads[b, row] >= 0).sum()) - taken
        for b, taken in enumerate(count[:, 0].tolist()):
            mains[b] += taken
    assert min(kept, refused) > 20
    plain = [critical_path.timeline(program) for program in PROGRAMS]
    assert run.state.threads.decoded.tolist() == [one.decoded for one in plain]
    steps = run.state.threads.steps.tolist()
    assert all(own < one.steps for own, one in zip(steps, plain, strict=True))
    for program, written in zip(PROGRAMS, run.written(), strict=True):
        assert written[0] == program.main.tolist()
        for number, block in enumerate(program.blocks, 1):
            assert written.get(number, []) == [*block.tolist(), program.close]


def test_the_models_own_blocks_stay():
    """Greedy, with drafts of what the model itself said before; most blocks run into their caps."""
    run = Run.begun(Drafting(Table()), PROGRAMS, free="blocks", rules=RULES)
    same = dataclasses.replace(run.state, pool=run.state.pool.pool)
    plain = dataclasses.replace(run, composition=Composition(), state=jax.tree.map(jnp.copy, same))
    while not plain.finished():
        plain.step()
    written = plain.written()
    table = successors(itertools.chain.from_iterable(one.values() for one in written), wrong=0.1)
    while not run.finished():
        advanced(run, table)
    assert run.written() == written
    assert (run.state.threads.steps < plain.state.threads.steps).all()
    assert (run.state.threads.decoded < RULES.max_tokens).all()  # nothing was cut
    for b, (program, own) in enumerate(zip(PROGRAMS, written, strict=True)):
        owners = np.asarray(run.state.pool.pool.owners)[b, : int(run.state.threads.slots[b])]
        for number, opening in enumerate(program.openings, 1):
            text = [token for token in own[number] if token != program.close]
            assert (owners == number).sum() <= len(opening) + len(text) + 1


@functools.partial(jax.jit, static_argnums=0)
def in_one_go(rules, known, state, drawn, count):
    return threads.lead(rules, known, state, drawn, count)


@functools.partial(jax.jit, static_argnums=0)
def one_by_one(rules, known, state, drawn, count):
    for j in range(drawn.shape[-1]):
        state = threads.accept(rules, known, state, drawn[..., j], j < count)
    return state


def by_thread(state):
    """Everything but the token to be fed, which the last of a step's tokens sets, and the order in
    which threads came within a step."""
    log, lines = state.log, []
    for b, decoded in enumerate(state.decoded.tolist()):
        found = np.stack([log.tokens[b], log.threads[b], log.steps[b]])[:, :decoded]
        lines.append(found[:, np.argsort(found[1], kind="stable")].tolist())
    rows = dataclasses.replace(state.rows, token=np.zeros_like(state.rows.token))
    return dataclasses.replace(state, rows=rows, log=None), lines


def test_text_in_one_go_is_text_token_by_token():
    """Letters and digits, in promises, too, wherever programs are."""
    run = Run.begun(Drafting(Table()), PROGRAMS, rules=RULES)
    table = successors([program.main for program in PROGRAMS], wrong=0.0)
    rng, tags = np.random.default_rng(1), set()
    while not run.finished():
        state = run.state.threads
        rows = jax.device_get(state.rows)
        speaks = rows.active & ~rows.closing & (rows.fed + 1 >= rows.opening)
        speaks &= ~np.asarray(state.done)[:, None]
        count = np.where(speaks, np.minimum(rng.integers(0, 4, speaks.shape), rows.left), 0)
        drawn = rng.choice(np.frombuffer(b"abc012", np.uint8), (*speaks.shape, 3)).astype(np.int32)
        given = RULES, run.known, state, drawn, count.astype(np.int32)
        made, expected = (jax.device_get(call(*given)) for call in (in_one_go, one_by_one))
        (made, lines), (expected, own) = by_thread(made), by_thread(expected)
        jax.tree.map(np.testing.assert_array_equal, made, expected)
        assert lines == own
        tags |= {int(x) for x, n in zip(made.main.tag, count[:, 0], strict=True) if n}
        advanced(run, table)
    assert tags >= {threads.TOPIC, threads.NUMBER}
