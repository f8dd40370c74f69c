# SPDX-License-Identifier: Apache-2.0
"""Programs forced through a composition of the decoder, and what each token must then give."""

import dataclasses
import functools

import jax
import numpy as np

from lm import prompting, transformer
from lm.async_decoding import composed, decode, language, simulate, threads, verify, verify_pool
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
    params=transformer.init(MODEL, jax.random.key(0)),
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
    """A composition on programs, step by step; `free` leaves blocks, or all, to the model."""

    composition: Composition
    static: decode.Program
    known: object
    script: jax.Array
    state: decode.Loop

    @classmethod
    def begun(cls, composition, programs, free="", rules=RULES):
        static, known, *prompts = verify_pool.arguments(SPEAKER, programs, rules)
        script = verify_pool.script_of(programs, free == "blocks")
        script = np.full_like(script, verify_pool.FREE) if free == "all" else script
        arguments = composition.ahead(static, SPEAKER.params, *prompts)
        fixed = static, composition, verify_pool.forcing
        script = jax.numpy.asarray(script)
        state = composed.begin(*fixed, SPEAKER.params, known, script, *arguments)
        return cls(composition, static, known, script, state)

    def step(self):
        """What was fed, and the logits after it, of one step."""
        given = SPEAKER.params, self.known, self.state, self.script
        self.state, (fed, logits) = _step(self.static, self.composition, *given)
        return fed, logits

    def finished(self) -> bool:
        return bool(self.state.threads.done.all())

    def written(self) -> list[dict[int, list[int]]]:
        """Tokens by thread, of each program."""
        host = jax.device_get(self.state.threads)
        return [verify_pool._by_thread(host, row) for row in range(len(host.done))]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(static, composition, params, known, state, script):
    forward = composition.forward(static, params)
    choose = verify_pool.forcing(static, script)
    return decode.step(static.rules, known, state, forward, choose)


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
