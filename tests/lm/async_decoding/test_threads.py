# SPDX-License-Identifier: Apache-2.0
"""The state machine on the device against a simulator of lists and sets, on random streams."""

import collections
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.async_decoding import (
    critical_path,
    decode,
    language,
    reading,
    simulate,
    tables,
    threads,
    verify_pool,
)
from lm.async_decoding.decode import Loop
from lm.async_decoding.threads import Rules
from lm.errors import UserError
from lm.text.tokenizers import ByteTokenizer
from tests.lm.async_decoding.thread_simulator import Simulator

# "42" and "007" are digits in one token; no tag has a capital
LETTERS = range(ord("A"), ord("Z") + 1)
TOKENIZER = ByteTokenizer().add_tokens((*language.TAGS, "42", "007"))
TAGS = language.tag_ids(TOKENIZER)
SIZE = TOKENIZER.vocab_size
KNOWN = jax.device_put(tables.make(TOKENIZER, TOKENIZER.stop_ids, SIZE))
SPEAKER = types.SimpleNamespace(tokenizer=TOKENIZER, stop_ids=TOKENIZER.stop_ids)
END = TOKENIZER.stop_ids[0]
B, THREADS, LENGTH, PROMPT = 16, 24, 160, 5
STEPPED, FEW, MANY = Rules(3, 120, "predicted"), *(Rules(n, 2100, "predicted") for n in (2, 9))


def nothing(fed, lengths, kept):
    """In place of a model."""
    return jnp.zeros((*fed.tokens.shape, 1)), kept


def scripted(script, before, logits):
    rows = before.rows
    request = jnp.arange(B)[:, None]
    thread = jnp.clip(rows.thread, 0, THREADS - 1)
    return script[request, thread, jnp.minimum(rows.count, LENGTH - 1)]


@functools.partial(jax.jit, static_argnums=0)
def begin(rules, script):
    choose = functools.partial(scripted, script)
    lengths = jnp.full(B, PROMPT, jnp.int32)
    state = decode.begin(rules, KNOWN, lengths, jnp.zeros((B, rules.rows, 1)), choose)
    return Loop((), state, lengths)


@functools.partial(jax.jit, static_argnums=0)
def step(rules, script, state):
    choose = functools.partial(scripted, script)
    return decode.step(rules, KNOWN, state, nothing, choose)


@functools.partial(jax.jit, static_argnums=0)
def loop(rules, script):
    choose = functools.partial(scripted, script)

    def one(state):
        return decode.step(rules, KNOWN, state, nothing, choose)[0]

    unfinished = functools.partial(decode.unfinished, 10_000)
    return jax.lax.while_loop(unfinished, one, begin(rules, script))


def letters(rng, most):
    return rng.integers(ord("A"), ord("Z") + 1, rng.integers(0, most + 1)).tolist()


def promise(rng):
    number = str(rng.choice([0, 7, 10, 20, 30, 42, 1_000_000, 10**13]))
    spelt = [TOKENIZER.token_id("42")] if number == "42" else TOKENIZER.encode(number).tolist()
    if rng.random() < 0.2:
        spelt = [TOKENIZER.token_id("007"), *spelt]
    topic = letters(rng, 3)
    tags = [TAGS[tag] for tag in (language.PROMISE, language.TOKENS, language.PROMISE_END)]
    return [tags[0], *topic, tags[1], *spelt, tags[2]]


def stream(rng, main):
    """Tokens that make sense for a while, torn at random."""
    out = []
    kinds = ["text", "promise", "torn", "sync", "tag", "end", "close"]
    odds = np.array([4, 4, 1, 1.5, 0.5, 0.4, 0] if main else [6, 0.2, 0.2, 0.1, 0.3, 0.1, 1])
    while len(out) < LENGTH:
        kind = rng.choice(kinds, p=odds / odds.sum())
        if kind == "text":
            out += letters(rng, 6)
        elif kind in ("promise", "torn"):
            made = promise(rng)
            if kind == "torn":
                made[int(rng.integers(len(made)))] = int(rng.choice([*TAGS.values(), 65, 49, END]))
            out += made
        elif kind == "sync":
            out.append(TAGS[language.SYNC])
        elif kind == "tag":
            out.append(int(rng.choice(list(TAGS.values()))))
        elif kind == "end":
            out.append(int(rng.choice(TOKENIZER.stop_ids)))
        else:
            out.append(TAGS[language.ASYNC_END])
    return [*out[: LENGTH - 1], END if main else TAGS[language.ASYNC_END]]  # and so on forever


def random_script(seed):
    rng = np.random.default_rng(seed)
    lines = [[stream(rng, not thread) for thread in range(THREADS)] for _ in range(B)]
    return np.array(lines, np.int32)


def simulators(script, rules, watch=False):
    def say(b, thread, index):
        return int(script[b, min(thread, THREADS - 1), min(index, LENGTH - 1)])

    return [
        Simulator(
            TOKENIZER,
            functools.partial(say, b),
            prompt=PROMPT,
            places=rules.rows - 1,
            max_tokens=rules.max_tokens,
            scheme=rules.scheme,
            form=rules.form,
            watch=watch,
        )
        for b in range(B)
    ]


def check_feed(fed, simulated, b):
    """What one step fed to request b, and what each row may read."""
    pool = simulated.pool
    owners = np.array([entry.thread for entry in pool])
    for row in np.flatnonzero(fed.threads[b] != threads.IDLE):
        slot = int(fed.slots[b, row])
        expected = pool[slot]
        assert (fed.threads[b, row], fed.tokens[b, row]) == (expected.thread, expected.token)
        assert fed.positions[b, row] == expected.position
        slots = np.arange(len(pool))
        own = owners == fed.threads[b, row]
        shared = (owners <= fed.joined[b, row]) & (slots < fed.forks[b, row])
        assert set(np.flatnonzero(own | shared).tolist()) == expected.sees


def check_answer(state, b, simulated):
    """Threads, text and warnings of a request that is done."""
    form = simulated.form
    found, _ = reading.threads_of(state, b, SPEAKER, form)
    assert found[0].ids.tolist() == simulated.main
    assert found[0].steps.tolist() == simulated.main_steps
    assert len(found) == 1 + len(simulated.started)
    for thread, block in zip(found[1:], simulated.started, strict=True):
        assert thread.ids[thread.forced :].tolist() == block.ids
        assert thread.ids[: thread.forced].tolist() == block.opening
        assert thread.steps.tolist() == block.steps
    given = reading.answer(state, b, "", np.zeros(0, np.int32), SPEAKER, form=form)
    assert given.steps == simulated.step
    whole = simulated.ended and all(block.closed for block in simulated.blocks)
    assert given.finished == whole
    assert given.decoded == simulated.decoded
    if form == "apar":
        assert given.text == forked_text(simulated)
        return
    # a letter is there as often as it came out, less those of topics
    spoken = collections.Counter()
    for thread in found:
        spoken.update(token for token in thread.ids[thread.forced :].tolist() if token in LETTERS)
    for block in simulated.blocks:
        spoken.subtract(token for token in block.topic)
    shown = collections.Counter(given.text.encode())
    for token in LETTERS:
        assert spoken[token] == shown[token] + swallowed(found[0].ids)[token]
    missing = len(simulated.blocks) - len(simulated.started)
    assert given.assembly.warnings.get("promise_without_block", 0) == missing


def forked_text(simulated):
    """Every fork replaced by its block, without tags and ends."""
    silent = {*TAGS.values(), *TOKENIZER.stop_ids}
    blocks = iter([block.ids for block in simulated.blocks])
    text = b""
    for token in simulated.main:
        ids = next(blocks) if token == TAGS[language.PROMISE_END] else [token]
        text += TOKENIZER.decode([one for one in ids if one not in silent]).encode()
    return text.decode()


def swallowed(main):
    """Letters of main in whole openings of blocks: nobody promised those."""
    pieces = language.pieces_of_ids(main, TOKENIZER, TOKENIZER.stop_ids)
    kinds = [piece.kind for piece in pieces]
    found = collections.Counter()
    for at in range(len(pieces) - 2):
        if kinds[at : at + 3] == [language.ASYNC, language.TEXT, language.ASYNC_BODY]:
            found.update(pieces[at + 1].text.encode())
    return found


@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        ("predicted", "async"),
        ("fork_join_max", "async"),
        ("fork_join_sum", "async"),
        ("fork_join_max", "apar"),
    ],
)
def test_every_step_is_the_simulators(scheme, form):
    """What is fed, where it stands and what it sees; three rows, so that promises queue."""
    rules = dataclasses.replace(STEPPED, scheme=scheme, form=form)
    script = random_script(len(scheme))
    simulated = simulators(script, rules, watch=True)
    for one in simulated:
        one.one()
    state = begin(rules, script)
    blocks = 0
    while not all(one.done for one in simulated):
        state, (fed, _) = step(rules, script, state)
        fed = jax.device_get(fed)
        for b, one in enumerate(simulated):
            if one.done:
                assert (fed.threads[b] == threads.IDLE).all()
                continue
            one.one()
            check_feed(fed, one, b)
            blocks += len(one.row_of) > 1
    final = jax.device_get(state.threads)
    assert final.done.all()
    assert blocks > 100
    for b, one in enumerate(simulated):
        check_answer(final, b, one)


@pytest.mark.parametrize("rules", [FEW, Rules(6, 60, "predicted")])
def test_whole_answers_are_the_simulators(rules):
    seen = collections.Counter()
    for seed in range(2):
        script = random_script(100 * rules.rows + seed)
        final = jax.device_get(loop(rules, script).threads)
        for b, one in enumerate(simulators(script, rules)):
            one.run()
            check_answer(final, b, one)
            given = reading.answer(final, b, "", np.zeros(0, np.int32), SPEAKER)
            seen.update(given.assembly.warnings.keys())
            seen["finished"] += given.finished
    wanted = {"unclosed_promise", "bad_tokens", "tag_in_block", "unclosed_block", "finished"}
    assert wanted <= set(seen)


def test_texts_do_not_depend_on_the_number_of_rows():
    script = random_script(7)
    found = []
    for rules in (FEW, MANY):
        final = jax.device_get(loop(rules, script).threads)
        found.append([reading.threads_of(final, b, SPEAKER)[0] for b in range(B)])
    for few, many in zip(*found, strict=True):
        assert [t.ids.tolist() for t in few] == [t.ids.tolist() for t in many]
        assert few[0].steps[-1] >= many[0].steps[-1]
    assert max(map(len, found[0])) > 5


def test_steps_are_the_critical_path():
    rng = np.random.default_rng(3)
    programs = [simulate.random_answer(rng, TOKENIZER, END, size=5, blocks=3) for _ in range(B)]
    script = np.full((B, THREADS, LENGTH), END, np.int32)
    given = verify_pool.script_of(programs)[:, :THREADS, :LENGTH]
    script[:, : given.shape[1], : given.shape[2]] = given
    final = jax.device_get(loop(MANY, script).threads)
    for b, program in enumerate(programs):
        line = critical_path.timeline(program)
        answer = reading.answer(final, b, "", np.zeros(0, np.int32), SPEAKER)
        assert (answer.steps, answer.decoded, answer.finished) == (line.steps, line.decoded, True)
        assert not answer.assembly.warnings.keys() - {
            "promises_without_sync",
            "sync_without_promises",
        }


def test_promises_of_any_size():
    """0 and a million tokens are the next legal numbers; a block ends at twice its promise."""
    script = np.full((B, THREADS, LENGTH), ord("x"), np.int32)
    line = []
    for number in ("0", "1000000"):
        tags = [TAGS[tag] for tag in (language.PROMISE, language.TOKENS, language.PROMISE_END)]
        line += [tags[0], tags[1], *TOKENIZER.encode(number).tolist(), tags[2]]
    script[:, 0, : len(line) + 2] = [*line, TAGS[language.SYNC], END]
    final = jax.device_get(loop(MANY, script).threads)
    answer = reading.answer(final, 0, "", np.zeros(0, np.int32), SPEAKER)
    assert [len(thread.ids) - 2 for thread in answer.threads[1:]] == [20, 2000]
    assert answer.text == "x" * 2020
    assert answer.finished
    assert dict(answer.assembly.warnings) == {"bad_tokens": 2, "unclosed_block": 2}


def test_text_becomes_final_in_reading_order():
    """What is told never changes, and all of it is told."""
    script = random_script(11)
    state = begin(STEPPED, script)
    told = [""] * B
    while not np.asarray(state.threads.done).all():
        host = jax.device_get(state.threads)
        for b in range(B):
            text = "".join(part for _, part in reading.final(host, b, SPEAKER))
            assert text.startswith(told[b])
            told[b] = text
        for _ in range(5):
            state = step(STEPPED, script, state)[0]
    host = jax.device_get(state.threads)
    for b in range(B):
        answer = reading.answer(host, b, "", np.zeros(0, np.int32), SPEAKER)
        assert answer.text.startswith(told[b])
        if answer.finished:
            assert "".join(part for _, part in reading.final(host, b, SPEAKER)) == answer.text


def test_a_vocabulary_without_tags_is_sequential():
    plain = ByteTokenizer()
    known = tables.make(plain, plain.stop_ids, 300)
    assert set(known.kinds.tolist()) == {tables.TEXT, tables.END}
    assert (known.opening, known.body, known.close) == (-1, -1, -1)
    assert not tables.has_tags(plain)


def test_positions_that_cannot_be_decoded_are_refused():
    with pytest.raises(UserError, match="positions='oracle' cannot be decoded"):
        Rules(2, 10, "oracle")
    with pytest.raises(UserError, match="positions='oracle' cannot be decoded"):
        decode.Settings(positions="oracle")
    with pytest.raises(UserError, match="positions='predicted': forks of APAR go on by"):
        decode.Settings(positions="predicted").rules("predicted", "apar")
    for wrong in ({"threads": 0}, {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(UserError, match=r"must be|must not"):
            decode.Settings(**wrong)
