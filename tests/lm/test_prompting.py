# SPDX-License-Identifier: Apache-2.0
"""Prompts for a checkpoint: templates, plain text, stop tokens, prompt files."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lm import generate, prompting, transformer
from lm.config import ModelConfig, SamplingConfig
from lm.errors import DataError, UserError
from lm.hf import weights
from lm.text import tokenizers

TINY = ModelConfig(
    vocab_size=384, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16
)


@pytest.fixture
def hf_dir(tmp_path):
    """A checkpoint whose tokenizer has fewer tokens than the model, and a template of its own."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), transformer.abstract(TINY)[1]
    )
    path = tmp_path / "hf"
    weights.save(path, TINY, params, tokenizer=tokenizers.ByteTokenizer())
    return path


def set_fields(path, **fields):
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | fields))


def test_hugging_face_directory(hf_dir):
    speaker = prompting.load_hf(hf_dir)
    tokenizer = speaker.tokenizer
    assert speaker.valid_vocab == tokenizer.vocab_size < speaker.model.vocab_size
    assert tokenizer.decode(speaker.prompt("hi")) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(speaker.prompt("hi", system="s")).startswith(
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n"
    )
    # what is trained here never sees a token that opens a text
    assert tokenizer.decode(speaker.prompt("hi", chat=False)) == "hi"
    (got,) = generate.generate(
        speaker.model,
        speaker.params,
        [speaker.prompt("hi")],
        SamplingConfig(max_new_tokens=5),
        speaker.stop_ids,
        jax.random.key(0),
        valid_vocab=speaker.valid_vocab,
    )
    assert got.stopped or len(got.tokens) == 5


def test_dtype_and_template(hf_dir):
    speaker = prompting.load_hf(hf_dir, dtype="bfloat16", template="chatml_plain")
    assert {str(x.dtype) for x in jax.tree.leaves(speaker.params)} == {"bfloat16"}
    assert speaker.model.dtype == "bfloat16"
    assert speaker.template.name == "chatml_plain"


def test_stop_tokens_of_the_checkpoint(hf_dir):
    assert 7 not in prompting.load_hf(hf_dir).stop_ids
    set_fields(hf_dir / "generation_config.json", eos_token_id=[7, 8])
    set_fields(hf_dir / "config.json", eos_token_id=9)
    speaker = prompting.load_hf(hf_dir)
    assert set(speaker.tokenizer.stop_ids) | {7, 8, 9} == set(speaker.stop_ids)
    (hf_dir / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match="generation_config"):
        prompting.load_hf(hf_dir)


def test_bos_only_where_the_tokenizer_says_so(hf_dir):
    set_fields(hf_dir / "tokenizer_config.json", add_bos_token=True)
    speaker = prompting.load_hf(hf_dir)
    assert speaker.tokenizer.decode(speaker.prompt("hi", chat=False)) == "<|bos|>hi"
    settings = json.loads((hf_dir / "tokenizer_config.json").read_text())
    del settings["add_bos_token"]  # older files do not say
    (hf_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    speaker = prompting.load_hf(hf_dir)
    assert speaker.tokenizer.decode(speaker.prompt("hi", chat=False)) == "<|bos|>hi"
    set_fields(hf_dir / "tokenizer_config.json", add_bos_token=False)
    speaker = prompting.load_hf(hf_dir)
    assert speaker.tokenizer.decode(speaker.prompt("hi", chat=False)) == "hi"
    with pytest.raises(UserError, match="the prompt is empty"):
        speaker.prompt("", chat=False)
    with pytest.raises(UserError, match="the prompt is empty"):
        speaker.rendered("", chat=True)  # a template would make something of it


def test_without_a_template(hf_dir):
    speaker = dataclasses.replace(prompting.load_hf(hf_dir), template=None)
    assert speaker.tokenizer.decode(speaker.prompt("hi")).endswith("hi")
    with pytest.raises(UserError, match="has no chat template"):
        speaker.prompt("hi", chat=True)
    with pytest.raises(UserError, match="needs a chat template"):
        speaker.prompt("hi", system="s")


def test_bad_directories(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        prompting.load_hf(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config\.json"):
        prompting.load_hf(tmp_path)
    with pytest.raises(UserError, match="not a workdir"):
        prompting.load_workdir(tmp_path)


def test_read_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('one\n\n{"prompt": "two\\nlines"}\n{not json}\n  \n"quoted"\n')
    assert prompting.read_prompts(path) == ["one", "two\nlines", "{not json}", '"quoted"']
    path.write_text('one\n{"text": "x"}\n')
    with pytest.raises(DataError, match=r"prompts\.txt:2: .*'prompt'"):
        prompting.read_prompts(path)
    path.write_text("\n \n")
    with pytest.raises(UserError, match="no prompts"):
        prompting.read_prompts(path)
    with pytest.raises(UserError, match="No such file"):
        prompting.read_prompts(tmp_path / "absent")
