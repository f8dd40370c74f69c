# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import numpy as np
import pytest

from lm import transformer
from lm.config import LoraConfig, ModelConfig
from lm.errors import UserError
from lm.single_pass import plan
from lm.single_pass.samples import Sample, samples_of
from lm.text import chat, tokenizers
from tests.lm.single_pass.adversarial import ALL, OTHERS

LLAMA_1B = ModelConfig(
    vocab_size=128256,
    num_layers=16,
    embed_dim=2048,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=8192,
    tied_embeddings=True,
    dtype="bfloat16",
)


def conversation(turns, human=100, thought=300, response=100, seed=0):
    rng = np.random.default_rng(seed)
    history, samples = np.zeros(0, np.int32), []
    for turn in range(turns):
        h, t, r = (rng.integers(0, 10**6, n, np.int32) for n in (human, thought, response))
        prompt = np.concatenate([history, h])
        tokens = np.concatenate([prompt, t, r])
        samples.append(Sample(tokens, len(prompt), turn, thought_length=thought))
        history = np.concatenate([prompt, r])
    return samples


@pytest.mark.parametrize(
    ("turns", "tokens", "flops"), [(8, 2.04, 1.86), (16, 3.37, 2.95), (32, 6.03, 5.08)]
)
def test_the_figures_of_the_specification(turns, tokens, flops):
    result = plan.plan([conversation(turns)] * 8, LLAMA_1B, seq_len=19456, window=256)
    tree = result["modes"]["tree"]
    assert tree["token_ratio"] == pytest.approx(tokens, abs=0.005)
    assert tree["predicted_speedup"] == pytest.approx(flops, abs=0.005)
    assert tree["longest"] == 600 * turns - 100
    assert tree["edges"] == 8 * turns * 400


def test_the_publication_needs_its_last_copy_too():
    result = plan.plan([conversation(8)], LLAMA_1B, seq_len=19456)["modes"]
    assert (result["tree"]["tokens"], result["paper"]["tokens"]) == (4700, 4800)
    assert result["n_pass"]["tokens"] == result["n_pass_merged"]["tokens"] == 9600
    assert result["paper"]["token_ratio"] == 2


def test_counts_by_hand():
    """Two turns of h=2, t=3, r=1 on a model with numbers that can be multiplied on paper."""
    model = ModelConfig(
        vocab_size=10, num_layers=2, embed_dim=4, num_heads=2, num_kv_heads=1, head_dim=2, mlp_dim=3
    )
    # per layer q 16, k 8, v 8, o 16, gate, up and down 12 each
    assert plan.trunk_parameters(model) == 2 * (16 + 8 + 8 + 16 + 36)
    result = plan.plan([conversation(2, 2, 3, 1)], model, ["tree"], seq_len=16)["modes"]
    # chains of 6 and 9 tokens
    assert (result["n_pass"]["tokens"], result["n_pass"]["edges"]) == (15, 8)
    assert result["n_pass"]["pairs"] == 21 + 45
    # the tree: 6 rows of turn 1, then 7 more whose path starts at depth 2
    assert result["tree"]["tokens"] == 13
    assert result["tree"]["pairs"] == 21 + sum(range(3, 10)) == 63
    flops = 6 * 168 * 13 + 6 * 4 * 10 * 8 + 12 * 2 * 2 * 2 * 63
    assert result["tree"]["flops"] == flops == plan.training_flops(model, 13, 8, 63)
    assert result["tree"]["padded_flops"] == flops + 6 * 168 * 3
    assert (result["tree"]["rows"], result["tree"]["fill"]) == (1, 13 / 16)
    assert result["n_pass"]["predicted_speedup"] == result["n_pass"]["padded_speedup"] == 1


def test_parameters_are_those_of_the_model():
    for tied in (False, True):
        model = ModelConfig(vocab_size=256, num_layers=3, tied_embeddings=tied)
        shapes = jax.tree.leaves(transformer.abstract(model)[1])
        matrices = sum(int(np.prod(x.shape)) for x in shapes)
        norms = model.embed_dim * (2 * model.num_layers + 1)
        assert plan.parameters(model) == matrices - norms


def test_adapters_are_those_of_the_model():
    lora = LoraConfig(rank=3, targets=("q", "o", "down"))
    model = ModelConfig(vocab_size=256, num_layers=3, lora=lora)
    flat = jax.tree_util.tree_flatten_with_path(transformer.abstract(model)[1])[0]
    sizes = sum(int(np.prod(x.shape)) for path, x in flat if "lora" in jax.tree_util.keystr(path))
    assert plan.adapter_parameters(model) == sizes


def test_lora_saves_the_gradients_of_the_base_weights():
    lora = dataclasses.replace(LLAMA_1B, lora=LoraConfig(rank=8))
    full, adapted = (plan.training_flops(m, 1000, 500, 10**6) for m in (LLAMA_1B, lora))
    assert 4 / 6 < adapted / full < 0.72
    memory = [plan.training_memory(m, 4096, "full") for m in (LLAMA_1B, lora)]
    assert memory[0] - memory[1] > 11 * plan.parameters(LLAMA_1B)


def test_memory_by_hand_and_its_order():
    model = dataclasses.replace(LLAMA_1B, dtype="float32")
    base = plan.parameters(model)
    D, N_H, K_H, F, L, T = 2048, 2048, 512, 8192, 16, 4096
    layer = 5 * D + 2 * N_H + 2 * K_H + 3 * F
    expected = 16 * base + 4 * T * (D * (L + 2) + layer) + 4 * 128256 * 1024
    assert plan.training_memory(model, T, "full") == expected
    none, dots, full = (plan.training_memory(model, T, r) for r in ("none", "dots", "full"))
    assert none > dots > full
    assert none - full == 4 * T * layer * (L - 1)
    sharded = plan.training_memory(model, T, "full", shards=4)
    assert expected - sharded == 12 * base
    with pytest.raises(UserError, match="remat"):
        plan.training_memory(model, T, "some")


def test_a_mode_that_refuses_the_data_is_null_with_its_reason():
    tokenizer = tokenizers.load_tokenizer("bytes")
    template = chat.load_template("chatml", tokenizer)
    model = ModelConfig(vocab_size=300)
    groups = [samples_of(c, template, tokenizer) for c in ALL.values()]
    result = plan.plan(iter(groups), model, ("tree", "paper", "k_pass(2)"), seq_len=8192)
    assert result["modes"]["paper"] is None
    assert "talk.jsonl:7: the duplicate layout" in result["refused"]["paper"]
    assert set(result["modes"]) == {"tree", "paper", "k_pass:2", "n_pass"}
    assert (result["conversations"], result["samples"]) == (len(groups), sum(map(len, groups)))
    assert len(OTHERS) < len(groups)
    edges = {m["trained_tokens"] for m in result["modes"].values() if m}
    assert len(edges) == 1


def test_a_mode_that_refuses_what_was_cut_is_null_too():
    """Turns whose context was cut from the left no longer go on with each other."""
    tokenizer = tokenizers.load_tokenizer("bytes")
    template = chat.load_template("chatml", tokenizer)
    model = ModelConfig(vocab_size=300)
    groups = [samples_of(c, template, tokenizer) for n, c in ALL.items() if n not in OTHERS]
    modes, reasons = ("tree", "paper"), set()
    for group in groups:
        result = plan.plan([group], model, modes, seq_len=150, overlong="truncate")
        assert result["modes"]["tree"]
        reasons |= {result["refused"].get("paper", "")}
    assert any("does not go on with the prompt" in reason for reason in reasons)


def test_what_does_not_fit_is_counted_per_mode():
    groups = [conversation(4, seed=seed) for seed in range(3)]
    result = plan.plan(groups, LLAMA_1B, ("tree",), seq_len=1000, window=4)["modes"]
    for mode in result.values():
        assert (mode["samples"], mode["dropped_samples"], mode["dropped_tokens"]) == (12, 3, 1200)
        assert mode["longest"] > 1000  # whole, as `tokens`; what is packed is less
        assert mode["fill"] * mode["row_tokens"] < mode["tokens"]
    assert result["tree"]["split_conversations"] == 3


def test_no_data():
    result = plan.plan([], LLAMA_1B)
    assert result["conversations"] == 0
    assert result["modes"]["tree"]["predicted_speedup"] is None
