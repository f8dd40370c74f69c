# SPDX-License-Identifier: Apache-2.0
"""The commands that verify token selection and generate with it: last lines and refusals."""

import jax
import numpy as np
import pytest

from experiments.methods import METHODS
from lm import transformer
from lm.config import ModelConfig, SamplingConfig
from lm.hf import weights
from lm.text import tokenizers
from tests import commands

CONFIG = "--config=configs/token_select.py:smoke"
SMALL = (
    CONFIG,
    "--config.select.n_init=2",
    "--config.select.k=8",
    "--config.select.n_local=16",
    "--config.select.chunk=16",
)
MODEL = ModelConfig(
    vocab_size=384, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16
)
TEXT = "all the tokens of this prompt are more than it reads at a step, by far"


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), transformer.abstract(MODEL)[1]
    )
    path = tmp_path_factory.mktemp("token_select") / "hf"
    weights.save(path, MODEL, params, tokenizer=tokenizers.ByteTokenizer())
    return path


def test_verify(hf_dir):
    result, _ = commands.run("token_select.verify", *SMALL, f"--hf_dir={hf_dir}", "--steps=4")
    errors = [result[name] for name in ("dense_error", "chunk_error", "ragged_error")]
    assert 0 < max(errors) < 1e-4
    assert result["selection_overlap"] == 1.0
    assert result["overlaps"] == {"xla": 1.0}
    assert result["tokens"] == 5 * 26 // 2 + 4
    assert result["cut"] == result["tokens"] - 26


def test_generate_beside_dense(hf_dir):
    flags = (
        f"--hf_dir={hf_dir}",
        f"--prompt={TEXT}",
        "--max_new_tokens=6",
        "--capacity=120",
        "--nochat",
    )
    result, _ = commands.run("token_select.generate", *SMALL, *flags)
    assert result["prompt_tokens"] == len(TEXT)
    assert result["tokens_read"] == 26
    assert result["dense"]["tokens_read"] > len(TEXT)
    assert 0 <= result["dense"]["agreement"] <= 1
    assert result["tokens"] == 6 or result["stopped"]


def test_any_checkpoint_through_the_common_command(hf_dir):
    """At the paper's setting, where a short prompt is read whole."""
    prompt = [np.array([65, 66, 67], np.int32)]
    sampling = SamplingConfig(max_new_tokens=3)
    texts = []
    for name in ("token_select", "dense"):
        opened = METHODS[name](hf_dir, True, None, None)
        ((made,),) = opened.stream(prompt, sampling, jax.random.key(0), chunk=3)
        texts.append(made.tokens.tolist())
    assert texts[0] == texts[1]


def test_a_refusal(hf_dir):
    flags = (f"--hf_dir={hf_dir}", "--prompt=a", "--max_new_tokens=6", "--capacity=20")
    reason = "a budget of 26 (select.n_init + k + n_local) is above the context of 20"
    assert reason in commands.refusal("token_select.generate", *SMALL, *flags)
