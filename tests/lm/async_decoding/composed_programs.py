# SPDX-License-Identifier: Apache-2.0
"""Programs forced through a composition of the decoder, and what each token must then give."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lm import prompting, transformer
from lm.async_decoding import decode, language, simulate, threads, verify, verify_pool
from lm.async_decoding.composed import Composition
from lm.config import ModelConfig
from lm.text.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer().add_tokens(language.TAGS)
END = TOKENIZER.stop_ids[0]
PROMPT = np.arange(40, 60, dtype=np.int32)
RULES = threads.Rules(13, 128, "predicted")
MODEL = ModelConfig(
    vocab_size=384, num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48
)
SPEAKER = prompting.Speaker(
    model=MODEL,
    params=jax.jit(transformer.init, static_argnums=0)(MODEL, jax.random.key(0)),
    tokenizer=TOKENIZER,
    template=None,
    stop_ids=TOKENIZER.stop_ids,
    valid_vocab=TOKENIZER.vocab_size,
)


def answer(seed: int = 3, blocks: int = 3):
    """A random program after `PROMPT`."""
    rng = np.random.default_rng(seed)
    made = simulate.random_answer(rng, TOKENIZER, END, size=4, blocks=blocks)
    return dataclasses.replace(made, prompt=PROMPT)


@dataclasses.dataclass
class Run:
    """A composition on programs, step by step as `composed` takes them: its own parts and the state
    machine are compiled apart, so that compositions share the latter. `free` leaves blocks, or all,
    to the model."""

    composition: Composition
    static: decode.Program
    known: object
    script: jax.Array
    state: decode.Loop

    @classmethod
    def begun(cls, composition, programs, free="", rules=RULES):
        static, known, *prompts = verify_pool.arguments(SPEAKER, programs, rules)
        script = verify_pool.script_of(programs, free == "blocks")
        script = jnp.full_like(script, verify_pool.FREE) if free == "all" else jnp.asarray(script)
        arguments = composition.ahead(static, SPEAKER.params, *prompts)
        logits, pool, slots = _prefill(static, composition, SPEAKER.params, *arguments)
        lengths = jnp.asarray(arguments[1])
        slots = lengths if slots is None else slots
        state = _first(static, known, lengths, logits, slots, script)
        return cls(composition, static, known, script, decode.Loop(pool, state, lengths))

    def step(self):
        """What was fed, and the logits after it, of one step."""
        fed, before = _feed(self.state.threads)
        given = SPEAKER.params, fed, before.slots, self.state.pool
        logits, pool = _forward(self.static, self.composition, *given)
        after = _settle(self.static, self.known, before, logits, self.script)
        self.state = dataclasses.replace(self.state, pool=pool, threads=after)
        return fed, logits

    def finished(self) -> bool:
        return bool(self.state.threads.done.all())

    def written(self) -> list[dict[int, list[int]]]:
        """Tokens by thread, of each program."""
        host = jax.device_get(self.state.threads)
        return [verify_pool._by_thread(host, row) for row in range(len(host.done))]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(static, composition, params, *arguments):
    return composition.prefill(static, params, *arguments)


@functools.partial(jax.jit, static_argnums=0)
def _first(static, known, lengths, logits, slots, script):
    every = jnp.pad(logits[:, None], ((0, 0), (0, static.rules.rows - 1), (0, 0)))
    choose = verify_pool.forcing(static, script)
    return decode.begin(static.rules, known, lengths, every, choose, slots)


_feed = jax.jit(threads.feed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(static, composition, params, fed, slots, pool):
    return composition.forward(static, params)(fed, slots, pool)


@functools.partial(jax.jit, static_argnums=0)
def _settle(static, known, before, logits, script):
    drawn = verify_pool.forcing(static, script)(before, logits)
    return threads.settle(static.rules, known, before, drawn)


def check_logits(run, program, expected):
    """Logits after every token of main and blocks of the only program."""
    main, count = len(program.prompt), 0
    while not run.finished():
        indices = np.asarray(run.state.threads.rows.fed)[0]
        fed, logits = run.step()
        owners = np.asarray(fed.threads)[0].tolist()
        for row, owner in enumerate(owners):
            if owner >= 0:
                name = (owner, int(indices[row]) if owner else main)
                np.testing.assert_allclose(expected[name], logits[0, row], rtol=0, atol=2e-5)
                count += 1
        main += owners[0] == 0
    assert count >= int(run.state.threads.decoded[0]) - 1


def without(program, dropped, scheme="predicted"):
    """Logits by name, where the answer, but not the prompt, sees less of the prompt: each thread as
    one sequence."""
    truth, standing = simulate.simulate(program), simulate.positions(program, scheme)
    unseen = {(0, index) for index in dropped}
    for name, one in truth.items():
        if name[0] or name[1] >= len(program.prompt):
            truth[name] = dataclasses.replace(one, sees=one.sees - unseen)
    names = sorted(truth)
    found = verify._alone(MODEL, SPEAKER.params, names, truth, standing)
    return dict(zip(names, found, strict=False))
