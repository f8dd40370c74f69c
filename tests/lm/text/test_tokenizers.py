# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: round trips, special tokens, offsets, files."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.text import chat, tokenizers, vocabulary

CORPUS = [
    "What is 12 + 34? The answer is 46.",
    "Now double it: 46 + 46 = 92. The answer is 92.",
    "naïve café, 東京, 🙂🙂",
] * 20
BYTES = tokenizers.load_tokenizer("bytes")
BPE = tokenizers.train_bpe(CORPUS, 400)
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])

# any text without surrogates, rich in special tokens
texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.sampled_from(
            [*vocabulary.SPECIAL_TOKENS, "<|im_", "end|>", "<think", "12345", " 東京🙂 "]
        ),
    ),
    max_size=6,
).map("".join)


@BOTH
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_decode_inverts_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == text
    np.testing.assert_array_equal(tokenizer.encode_batch([text, "x"])[0], ids)


@BOTH
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_offsets_name_the_characters(tokenizer, text):
    ids, offsets = tokenizer.encode_with_offsets(text)
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert offsets.shape == (len(ids), 2)
    covered = np.zeros(len(text), bool)
    for token_id, (start, end) in zip(ids.tolist(), offsets.tolist(), strict=True):
        covered[start:end] = True
        piece = tokenizer.decode([token_id])
        if "\ufffd" not in piece:
            assert text[start:end] == piece
    assert covered.all()


@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_saved_bytes_tokenize_alike(text):
    loaded = tokenizers.JsonTokenizer(
        BYTES.definition, name="saved", special_tokens=BYTES.special_tokens
    )
    for mine, other in zip(
        BYTES.encode_with_offsets(text), loaded.encode_with_offsets(text), strict=True
    ):
        np.testing.assert_array_equal(mine, other)
    assert loaded.decode(BYTES.encode(text), skip_special=True) == BYTES.decode(
        BYTES.encode(text), skip_special=True
    )


@BOTH
def test_special_tokens(tokenizer):
    text = "<|im_start|>user\nhi<|im_end|><think>a</think>"
    ids = tokenizer.encode(text).tolist()
    for token in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert ids.count(tokenizer.token_id(token)) == 1
    # control tokens go, the markup that a parser needs stays
    assert tokenizer.decode(ids, skip_special=True) == "user\nhi<think>a</think>"
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == ("<|bos|>", "<|eos|>", "<|pad|>")
    assert tokenizer.stop_ids == (tokenizer.token_id("<|eos|>"), tokenizer.token_id("<|im_end|>"))
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode_with_offsets("")[1].shape == (0, 2)


def test_byte_ids():
    assert BYTES.encode("a<|eos|>é").tolist() == [97, 258, 0xC3, 0xA9]
    assert BYTES.vocab_size == 256 + 11
    assert BYTES.token_id("a") == 97
    assert BYTES.token_id("é") is None
    assert BYTES.decode([0xC3, 97, 258, 0xA9]) == "\ufffda<|eos|>\ufffd"


@BOTH
def test_ids_outside_the_vocabulary(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.vocab_size, 10**6]) == "ab"
    assert tokenizer.token_text(tokenizer.vocab_size) == f"<{tokenizer.vocab_size}>"
    with pytest.raises(ValueError, match="negative"):
        tokenizer.decode([-1])


@BOTH
def test_token_text(tokenizer):
    assert tokenizer.token_text(tokenizer.token_id("<think>")) == "<think>"
    assert tokenizer.token_text(tokenizer.encode("7")[0]) == "7"
    partial = tokenizer.token_text(tokenizer.encode("ÿ")[0])
    assert "c3" in partial.lower()
    for token_id in range(tokenizer.vocab_size):
        assert tokenizer.token_text(token_id)


def test_sentencepiece_style_token_text():
    definition = json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "decoder": {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            "model": {"type": "BPE", "vocab": {"▁": 0, "a": 1, "▁a": 2}, "merges": [["▁", "a"]]},
        }
    )
    tokenizer = tokenizers.JsonTokenizer(definition, name="sp")
    assert tokenizer.encode(" a").tolist() == [2]
    assert tokenizer.token_text(2) == " a"
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.stop_ids) == (None,) * 3 + ((),)


@BOTH
def test_add_tokens(tokenizer):
    more = tokenizer.add_tokens(["<promise>", "<think>", "<promise>", "<|eot_id|>"])
    assert more.vocab_size == tokenizer.vocab_size + 2
    assert more.token_id("<promise>") == tokenizer.vocab_size
    assert more.token_id("<think>") == tokenizer.token_id("<think>")
    assert more.encode("a<promise>").tolist() == [*tokenizer.encode("a"), tokenizer.vocab_size]
    assert more.decode(more.encode("a<promise>"), skip_special=True) == "a<promise>"
    assert more.stop_ids == (*tokenizer.stop_ids, more.token_id("<|eot_id|>"))
    assert more.fingerprint != tokenizer.fingerprint
    assert more.add_tokens(["<x>"]).token_id("<promise>") == tokenizer.vocab_size
    # the original is as it was
    assert tokenizer.token_id("<promise>") is None
    with pytest.raises(UserError, match="empty"):
        tokenizer.add_tokens([""])


@BOTH
def test_save_and_load(tokenizer, tmp_path):
    more = tokenizer.add_tokens(["<promise>"])
    more.save(tmp_path / "t")
    loaded = tokenizers.load_tokenizer(str(tmp_path / "t"))
    text = "<|im_start|>12 naïve<promise>東<|eos|>"
    np.testing.assert_array_equal(loaded.encode(text), more.encode(text))
    assert loaded.fingerprint == more.fingerprint
    assert (loaded.bos, loaded.eos, loaded.pad) == (more.bos, more.eos, more.pad)
    assert loaded.stop_ids == more.stop_ids
    assert loaded.vocab_size == more.vocab_size
    templates = [chat.load_template(None, t) for t in (more, loaded)]
    assert templates[0].fingerprint == templates[1].fingerprint
    by_file = tokenizers.load_tokenizer(str(tmp_path / "t" / "tokenizer.json"))
    assert by_file.fingerprint == more.fingerprint
    copied = pickle.loads(pickle.dumps(loaded))
    np.testing.assert_array_equal(copied.encode(text), more.encode(text))


def test_training_is_deterministic():
    again = tokenizers.train_bpe(iter(CORPUS), 400)
    assert again.definition == BPE.definition
    assert again.fingerprint == BPE.fingerprint
    other = tokenizers.train_bpe(CORPUS[:1], 300)
    assert other.fingerprint != BPE.fingerprint


def test_trained_vocabulary():
    assert BPE.token_id("<|pad|>") == 0
    assert len(BPE.encode("The answer is ")) < len("The answer is ") / 2
    # digits stay apart
    assert len(BPE.encode("46")) == 2
    with pytest.raises(UserError, match="too small"):
        tokenizers.train_bpe(CORPUS, 256)


def test_training_does_not_learn_the_inside_of_special_tokens():
    tokenizer = tokenizers.train_bpe(["<tool_response>ab</tool_response>"] * 50, 300)
    assert len(tokenizer.encode("tool_response")) == len("tool_response")
    assert len(tokenizer.encode("ab")) == 1


def test_hugging_face_companions(tmp_path):
    """Tokens as dicts of flags, tokens known only to the settings, post-processors and padding."""
    definition = json.loads(BPE.definition)
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [1], "tokens": ["<|bos|>"]}},
    }
    definition["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    settings_ = {
        "eos_token": {"content": "<|eos|>", "lstrip": False},
        "bos_token": None,
        "added_tokens_decoder": {
            str(BPE.vocab_size): {"content": "<late>", "special": True, "normalized": False}
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|bos|>"}))
    tokenizer = tokenizers.load_tokenizer(str(tmp_path))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == ("<|bos|>", "<|eos|>", None)
    text = "The answer is 46"
    np.testing.assert_array_equal(tokenizer.encode(text), BPE.encode(text))
    assert tokenizer.encode("<late>").tolist() == [BPE.vocab_size]

    settings_["added_tokens_decoder"] = {"3": {"content": "<late>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    with pytest.raises(UserError, match="disagree about '<late>'"):
        tokenizers.load_tokenizer(str(tmp_path))


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="no such file or directory"):
        tokenizers.load_tokenizer(str(tmp_path / "absent"))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no tokenizer.json .*tokenizer\.model"):
        tokenizers.load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        tokenizers.load_tokenizer(str(tmp_path))
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match="eos_token '</s>' is not in its vocabulary"):
        tokenizers.load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(UserError, match="not JSON"):
        tokenizers.load_tokenizer(str(tmp_path))


@BOTH
def test_lone_surrogates_are_bad_input(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(UserError, match="lone surrogate"):
            encode("ab\ud800")
