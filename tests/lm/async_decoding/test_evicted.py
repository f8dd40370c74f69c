# SPDX-License-Identifier: Apache-2.0
"""A thinned prompt is what threads see of it, whoever chose: an evictor, or a draft's tokens."""

import dataclasses

import jax
import numpy as np
import pytest

from lm import prompting, transformer
from lm.async_decoding import (
    composed,
    critical_path,
    evicted,
    language,
    simulate,
    threads,
    verify,
    verify_pool,
)
from lm.async_decoding.evicted import Thinned
from lm.config import ModelConfig, SamplingConfig
from lm.draft_inference.draft import FirstLayers
from lm.draft_inference.method import Drafted
from lm.draft_inference.speckv import SpecKV
from lm.errors import UserError
from lm.long_context import decode as long_decode
from lm.text.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer().add_tokens(language.TAGS)
END = TOKENIZER.stop_ids[0]
PROMPT = np.arange(40, 60, dtype=np.int32)
RULES = threads.Rules(13, 128, "predicted")


def speaker_of(layers: int, heads: int) -> prompting.Speaker:
    model = ModelConfig(
        vocab_size=384,
        num_layers=layers,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=heads,
        head_dim=8,
        mlp_dim=48,
    )
    params = transformer.init(model, jax.random.key(0))
    stops, real = TOKENIZER.stop_ids, TOKENIZER.vocab_size
    return prompting.Speaker(model, params, TOKENIZER, None, stops, valid_vocab=real)


def answer(seed: int = 3, blocks: int = 3):
    rng = np.random.default_rng(seed)
    made = simulate.random_answer(rng, TOKENIZER, END, size=4, blocks=blocks)
    return dataclasses.replace(made, prompt=PROMPT)


def spec_kv(budget: int, layers: int = 1) -> Drafted:
    """Drafted by the first layers, with a window of 2 and 3 drafted tokens."""
    return Drafted(FirstLayers(layers), SpecKV(budget, window=2, kernel=3), lookahead=3)


def begun(speaker, composition, program, free=False, rules=RULES):
    """Static part, tables, script and the loop after the first token; `free` forces nothing."""
    static, known, tokens, lengths = verify_pool.arguments(speaker, [program], rules)
    script = jax.numpy.asarray(verify_pool.script_of([program]))
    script = jax.numpy.full_like(script, verify_pool.FREE) if free else script
    arguments = composition.ahead(static, speaker.params, tokens, lengths)
    fixed = static, composition, verify_pool.forcing
    state = composed.begin(*fixed, speaker.params, known, script, *arguments)
    return static, known, script, state


def check_logits(speaker, program, begun, expected):
    """Logits after every token of main and blocks."""
    static, known, script, state = begun
    main, count = len(program.prompt), 0
    while not bool(state.threads.done.all()):
        indices = np.asarray(state.threads.rows.fed)[0]
        state, (fed, logits) = verify_pool._step(static, speaker.params, known, state, script)
        owners = np.asarray(fed.threads)[0].tolist()
        for row, owner in enumerate(owners):
            if owner >= 0:
                name = (owner, int(indices[row]) if owner else main)
                np.testing.assert_allclose(expected[name], logits[0, row], rtol=0, atol=2e-5)
                count += 1
        main += owners[0] == 0
    assert count >= critical_path.timeline(program).decoded - 1


def without(speaker, program, dropped):
    """Logits by name, where the answer, but not the prompt, sees less of the prompt: each thread as
    one sequence."""
    truth, standing = simulate.simulate(program), simulate.positions(program, "predicted")
    unseen = {(0, index) for index in dropped}
    for name, one in truth.items():
        if name[0] or name[1] >= len(program.prompt):
            truth[name] = dataclasses.replace(one, sees=one.sees - unseen)
    names = sorted(truth)
    found = verify._alone(speaker.model, speaker.params, names, truth, standing)
    return dict(zip(names, found, strict=False))


def test_threads_on_a_thinned_prompt():
    speaker, program = speaker_of(2, 2), answer()
    evictor = evicted.build("streaming_llm", 6)
    start = begun(speaker, Thinned(evictor), program)
    assert start[-1].threads.slots.tolist() == [6]
    sinks = evictor.sinks
    expected = without(speaker, program, range(sinks, len(PROMPT) - 6 + sinks))
    check_logits(speaker, program, start, expected)


def test_main_on_a_prompt_that_a_draft_thinned():
    """The model's own choice, beside decoding after the same method, token by token; layers and KV
    heads keep different tokens."""
    speaker, method = speaker_of(2, 2), spec_kv(8)
    composition = Thinned(method, TOKENIZER.stop_ids)
    static, known, script, state = begun(speaker, composition, answer(), free=True)
    assert state.threads.slots.tolist() == [9]  # the last token was fed again
    while int(state.threads.step) < 24 and not bool(state.threads.done.all()):
        state, _ = verify_pool._step(static, speaker.params, known, state, script)
    found, _ = long_decode.decode(
        speaker.model,
        speaker.params,
        [PROMPT],
        SamplingConfig(temperature=0.0, max_new_tokens=24),
        method,
        TOKENIZER.stop_ids,
        jax.random.key(0),
        valid_vocab=TOKENIZER.vocab_size,
    )
    count = int(state.threads.rows.count[0, 0])
    assert count >= 8
    assert state.threads.main.tokens[0, :count].tolist() == found[0].tokens.tolist()[:count]


def test_heads_that_keep_unequal_numbers_are_refused():
    method = Drafted(FirstLayers(1), SpecKV(8, window=2, coverage=0.5), lookahead=3)
    with pytest.raises(UserError, match="unequal"):
        begun(speaker_of(1, 1), Thinned(method), answer())
