# SPDX-License-Identifier: Apache-2.0
"""Generation against full forward passes, token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import contexts, generate, sharding, transformer
from lm.config import MeshConfig, ModelConfig, RopeScaling, SamplingConfig
from lm.errors import UserError
from ops.visibility import Visibility

TINY = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
)
MODELS = {
    "gqa_llama3": dataclasses.replace(
        TINY, rope_scaling=RopeScaling("llama3", 4.0, original_max_positions=16)
    ),
    "mqa_qk_norm_tied_yarn": dataclasses.replace(
        TINY,
        num_kv_heads=1,
        qk_norm=True,
        tied_embeddings=True,
        rope_scaling=RopeScaling("yarn", 4.0, original_max_positions=16),
    ),
    "mha_bias_softcap_gemma": dataclasses.replace(
        TINY,
        num_kv_heads=4,
        qkv_bias=True,
        logit_softcap=5.0,
        activation="gelu_tanh",
        norm_plus_one=True,
        scale_embeddings=True,
    ),
}
# Most tests run three or four prompts of up to 32 tokens, so that they share compiled programs.
GREEDY = SamplingConfig(max_new_tokens=12)
DRAWN = SamplingConfig(temperature=1.5, max_new_tokens=12)


@functools.cache
def params_of(config: ModelConfig) -> transformer.Params:
    """Larger than a real initialisation, so that greedy continuations differ and do not loop."""
    rng = np.random.default_rng(0)

    def leaf(x):
        scale = 1.0 if x.ndim < 3 else 2.0 / np.sqrt(config.embed_dim)
        return jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32)

    return jax.tree.map(leaf, transformer.abstract(config)[1])


def prompts_of(lengths) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, 64, n).astype(np.int32) for n in lengths]


def run(prompts, sampling=GREEDY, stops=(), config=TINY, seed=1, **kwargs):
    return generate.generate(
        config, params_of(config), prompts, sampling, stops, jax.random.key(seed), **kwargs
    )


def tokens_of(generations) -> list[list[int]]:
    return [g.tokens.tolist() for g in generations]


def full_logits(config: ModelConfig, params: transformer.Params, tokens: np.ndarray) -> jax.Array:
    """Logits [T, V] of one plain causal pass, which what follows on the right cannot change."""
    padded = np.zeros(32, np.int32)
    padded[: len(tokens)] = tokens
    return _full_logits(config, params, padded)[: len(tokens)]


@functools.partial(jax.jit, static_argnums=0)
def _full_logits(config, params, tokens):
    context = contexts.Training(Visibility.causal(1, len(tokens)), implementation="reference")
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    states, _ = transformer.hidden(config, params, tokens[None], positions, context)
    return transformer.logits(config, params, states[0])


prefill_logits = jax.jit(generate.prefill_logits, static_argnums=(0, 4))
decode_logits = jax.jit(generate.decode_logits, static_argnums=0)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_step_equals_a_full_forward_pass(config):
    params = params_of(config)
    sequences = prompts_of([29, 24, 21])
    starts = [20, 7, 1]
    padded = np.zeros((3, 24), np.int32)
    for row, sequence, start in zip(padded, sequences, starts, strict=True):
        row[:start] = sequence[:start]
    wanted = [full_logits(config, params, sequence) for sequence in sequences]
    logits, cache = prefill_logits(config, params, padded, jnp.array(starts), 32)
    for step in range(9):
        for row, start in enumerate(starts):
            np.testing.assert_allclose(
                logits[row], wanted[row][start + step - 1], atol=1e-4, rtol=1e-4
            )
        tokens = jnp.array([s[start + step] for s, start in zip(sequences, starts, strict=True)])
        logits, cache = decode_logits(config, params, tokens, cache)
    np.testing.assert_array_equal(cache.lengths, [29, 16, 10])


def test_greedy_equals_repeated_full_passes():
    params, prompts = params_of(TINY), prompts_of([3, 19, 2])
    for prompt, got in zip(prompts, run(prompts), strict=True):
        tokens, log_probs = prompt.tolist(), []
        for _ in range(GREEDY.max_new_tokens):
            row = jax.nn.log_softmax(full_logits(TINY, params, np.array(tokens))[-1])
            tokens.append(int(jnp.argmax(row)))
            log_probs.append(float(row[tokens[-1]]))
        assert got.tokens.tolist() == tokens[len(prompt) :]
        assert got.tokens.dtype == np.int32
        np.testing.assert_allclose(got.log_probs, log_probs, atol=1e-4)
        assert not got.stopped


def test_ragged_batch_equals_each_prompt_alone():
    prompts = prompts_of([1, 31, 16, 17])
    together = tokens_of(run(prompts))
    assert together == [tokens_of(run([prompt]))[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens in together}) == len(prompts)


def test_draws_depend_on_key_and_index_only():
    prompt = prompts_of([19])[0]
    same = tokens_of(run([prompt] * 3, DRAWN))
    assert len({tuple(tokens) for tokens in same}) == 3
    assert tokens_of(run([prompt] * 3, DRAWN)) == same
    assert tokens_of(run([prompt], DRAWN, indices=[2])) == same[2:]
    others = prompts_of([30, 4])
    assert tokens_of(run([*others, prompt], DRAWN))[2] == same[2]
    assert tokens_of(run([prompt] * 3, DRAWN, seed=2)) != same


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_stream_concatenates_to_generate(chunk):
    prompts = prompts_of([5, 30, 8])
    whole = run(prompts, DRAWN)
    stop = int(whole[0].tokens[6])
    whole = run(prompts, DRAWN, [stop])
    pieces = list(
        generate.stream(
            TINY, params_of(TINY), prompts, DRAWN, [stop], jax.random.key(1), chunk=chunk
        )
    )
    for index, wanted in enumerate(whole):
        parts = [piece[index] for piece in pieces]
        np.testing.assert_array_equal(np.concatenate([p.tokens for p in parts]), wanted.tokens)
        np.testing.assert_array_equal(
            np.concatenate([p.log_probs for p in parts]), wanted.log_probs
        )
        assert parts[-1].stopped == wanted.stopped
        assert all(len(p.tokens) <= chunk for p in parts)


def test_stop_tokens_end_a_sequence_and_are_not_part_of_it():
    prompts = prompts_of([4, 11, 23])
    free = tokens_of(run(prompts))
    stop = free[1][5]
    got = run(prompts, stops=[63, stop])
    for sequence, generation in zip(free, got, strict=True):
        ends = [i for i, token in enumerate(sequence) if token in (stop, 63)]
        cut = ends[0] if ends else len(sequence)
        assert generation.tokens.tolist() == sequence[:cut]
        assert generation.stopped == bool(ends)
    assert got[1].stopped


def test_the_loop_ends_when_all_are_done():
    prompts = prompts_of([4, 11, 23])
    stops = [generation.tokens[0] for generation in run(prompts)]
    pieces = list(
        generate.stream(TINY, params_of(TINY), prompts, GREEDY, stops, jax.random.key(0), chunk=1)
    )
    assert len(pieces) == 1
    assert [len(g.tokens) for g in pieces[0]] == [0, 0, 0]
    assert all(g.stopped for g in pieces[0])


def test_padding_of_the_vocabulary_is_never_drawn():
    params, prompts = params_of(TINY), prompts_of([6, 7, 20])
    # the last ids would often win: their rows are longer
    table = params["unembed"]["table"].at[50:].multiply(30.0)
    arguments = (TINY, params | {"unembed": {"table": table}}, prompts, GREEDY, ())
    free = generate.generate(*arguments, jax.random.key(0))
    assert max(map(max, tokens_of(free))) >= 50
    limited = generate.generate(*arguments, jax.random.key(0), valid_vocab=50)
    assert max(map(max, tokens_of(limited))) < 50
    for generation in limited:
        assert np.all(generation.log_probs > -30)  # normalised over the real tokens


def test_lengths_share_programs(monkeypatch):
    traces = []
    hidden = transformer.hidden
    monkeypatch.setattr(
        transformer, "hidden", lambda *a, **k: traces.append(a[2].shape) or hidden(*a, **k)
    )
    config = dataclasses.replace(TINY, mlp_dim=40)
    for lengths in ([3, 5, 9], [12, 16, 1], [2, 2, 2, 2], [17, 20, 31], [32, 2, 2]):
        run(prompts_of(lengths), config=config)
    # a prefill for prompts of up to 16 tokens, one for up to 32, and one loop: both fit 64 slots
    assert sorted(traces) == [(4, 1), (4, 16), (4, 32)]


def test_buckets():
    lengths = np.arange(1, 5000)
    buckets = np.array([generate.bucket(int(n)) for n in lengths])
    assert np.all(buckets >= lengths)
    assert np.all(np.diff(buckets) >= 0)
    large = lengths > 64
    assert np.all(buckets[large] % 64 == 0)
    assert np.all(buckets[large] < 2 * lengths[large])
    assert len(set(buckets)) < 20


def test_implementations_agree():
    prompts = prompts_of([13, 30, 1])
    assert tokens_of(run(prompts, implementation="reference")) == tokens_of(run(prompts))


def test_four_devices_equal_one():
    prompts = prompts_of([3, 20, 31])
    split = sharding.make(MeshConfig(fsdp=2, tensor=2), TINY)
    params = params_of(TINY)
    placed = jax.device_put(params, split.params(params))
    one = run(prompts, DRAWN, [7], seed=3)
    four = generate.generate(TINY, placed, prompts, DRAWN, [7], jax.random.key(3), sharding=split)
    assert tokens_of(one) == tokens_of(four)
    assert [g.stopped for g in one] == [g.stopped for g in four]


def test_bfloat16_from_float32_parameters():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    prompts = prompts_of([5, 8, 30])
    got = run(prompts, config=config)
    cast = generate.prepare(config, params_of(config))
    assert {x.dtype for x in jax.tree.leaves(cast)} == {jnp.dtype("bfloat16")}
    again = generate.generate(config, cast, prompts, GREEDY, (), jax.random.key(1))
    assert tokens_of(got) == tokens_of(again)


def test_measure():
    timing = generate.measure(
        TINY, params_of(TINY), prompts_of([5, 8, 30]), GREEDY, jax.random.key(0)
    )
    assert timing.prefill > 0
    assert len(timing.steps) == GREEDY.max_new_tokens - 1
    summary = timing.summary(3)
    seconds = timing.prefill + timing.steps.sum()
    assert summary["tokens_per_s"] == pytest.approx(3 * GREEDY.max_new_tokens / seconds)
    assert 0 < summary["token_ms_p50"] <= summary["token_ms_p95"]


def test_refusals():
    with pytest.raises(UserError, match="no prompts"):
        run([])
    with pytest.raises(UserError, match="prompt 1 is empty"):
        run([np.array([1], np.int32), np.zeros(0, np.int32)])
    with pytest.raises(UserError, match=r"prompt 0 has 20 tokens and 12 .* capacity of 31"):
        run(prompts_of([20, 3]), capacity=31)
    with pytest.raises(UserError, match="1 indices for 2 prompts"):
        run(prompts_of([2, 3]), indices=[0])
    with pytest.raises(UserError, match="chunk=0"):
        next(
            generate.stream(
                TINY, params_of(TINY), prompts_of([2]), GREEDY, (), jax.random.key(0), chunk=0
            )
        )


def test_a_full_cache_is_enough():
    prompts = prompts_of([20, 3, 7])
    assert tokens_of(run(prompts, capacity=32)) == tokens_of(run(prompts))
