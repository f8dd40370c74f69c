# SPDX-License-Identifier: Apache-2.0
"""Plain text in packed rows: every token is trained once, and never across documents."""

import json

import numpy as np
import pytest

from lm import setup
from lm.config import Config, DataConfig, ModelConfig
from lm.data import arithmetic, documents, packing
from lm.data.layout import EDGE_FIELDS, ROW_FIELDS
from lm.data.python_source import Document
from lm.errors import UserError
from lm.text import chat, tokenizers

BYTES = tokenizers.load_tokenizer("bytes")
TEMPLATE = chat.load_template(None, BYTES)


def trained(row):
    """[(context of one edge, target)] of a row, read from the arrays as a model would."""
    out = []
    for r, target in zip(row["edge_rows"], row["edge_targets"], strict=True):
        if target >= 0:
            seen = [j for j in range(r + 1) if row["until"][j] > r]
            positions = row["positions"][seen]
            assert positions.tolist() == list(range(len(seen)))
            out.append((tuple(row["tokens"][seen].tolist()), int(target)))
    return out


def test_every_token_of_every_document_is_trained_once():
    texts = ["a", "bcdefghijklmnopqrst", "uv", ""]
    source = [Document(text) for text in texts]
    rows = list(documents.rows(source, TEMPLATE, BYTES, seq_len=8, window=4, shuffle=False))
    assert {name for row in rows for name in row} == {*ROW_FIELDS, *EDGE_FIELDS}
    bos, eos = BYTES.token_id(BYTES.bos), BYTES.token_id(BYTES.eos)
    whole = [[bos, *text.encode(), eos] for text in texts]
    expected = []
    for ids in whole:
        for i in range(1, len(ids)):
            start = (i - 1) // 7 * 7  # pieces of 8 share a token
            expected.append((tuple(ids[start:i]), ids[i]))
    assert sorted(pair for row in rows for pair in trained(row)) == sorted(expected)


def test_weights_and_counts():
    source = [Document("abc"), Document("defghijklmn")]
    dataset = documents.rows(source, TEMPLATE, BYTES, seq_len=10, window=8, shuffle=False)
    iterator = iter(packing.batches(dataset, 2, 10))
    (batch,) = list(iterator)
    assert batch["tokens"].shape == (2, 10)
    real = batch["edge_targets"] >= 0
    assert (batch["edge_weights"] == real).all()
    assert real.sum() == 4 + 12
    totals = packing.statistics(iterator)
    assert (totals["documents"], totals["trained_tokens"], totals["edges"]) == (2, 16, 16)


def test_tokens_are_made_once_as_far_as_there_is_room():
    class Counting(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    source = Counting([Document("abc"), Document("defghi"), Document("jk")])
    tokens = documents.Tokenised(source, TEMPLATE, BYTES, room=9)  # 5 and 4 of 5, 8 and 4
    for _ in range(3):
        assert [len(tokens[i][0]) for i in range(3)] == [5, 8, 4]
    assert source.reads == 1 + 3 + 1


def test_epochs_resume_where_they_stopped():
    source = [Document(f"text number {i}") for i in range(12)]

    def fresh():
        return iter(documents.rows(source, TEMPLATE, BYTES, seq_len=24, window=3, epochs=2, seed=1))

    whole = [row["tokens"] for row in fresh()]
    first = fresh()
    for _ in range(5):
        next(first)
    again = fresh()
    again.set_state(first.get_state())
    assert np.array_equal([row["tokens"] for row in again], whole[5:])


def test_a_short_piece_is_a_chain():
    layout = documents.chain(np.array([5], np.int32))
    assert (layout.length, layout.num_edges) == (1, 0)
    with pytest.raises(ValueError, match="at least 2"):
        documents.chains(np.arange(4, dtype=np.int32), 1)


def test_conversations_feed_the_same_pipeline():
    conversation = arithmetic.generate(0, 0)
    (text,) = documents.texts_of(conversation, TEMPLATE)
    assert all(message.content in text for message in conversation.messages)
    assert conversation.messages[1].thought in text
    (ids,) = documents.tokens_of(conversation, TEMPLATE, BYTES)
    assert BYTES.decode(ids) == text
    rows = list(documents.rows([conversation], TEMPLATE, BYTES, seq_len=1024, window=1))
    assert len(trained(rows[0])) == len(ids) - 1


def test_branches_are_texts_of_their_own(tmp_path):
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "one"}
    branch = {"at": 1, "messages": [{"role": "assistant", "content": "two"}]}
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"messages": [user, answer], "branches": [branch]}))
    config = DataConfig(source=str(file), validation_fraction=0.0)
    (record,) = setup.records(config)
    texts = list(documents.texts_of(record, TEMPLATE))
    assert ["one" in text for text in texts] == [True, False]
    assert ["two" in text for text in texts] == [False, True]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for i in range(10):
        (root / f"file{i}.py").write_text(f"def function_{i}():\n    return {i} * number_{i}\n")
    return str(root)


def config_of(tree, **data):
    return Config(
        model=ModelConfig(),
        data=DataConfig(source=f"python:{tree}", seq_len=64, window=4, **data),
    )


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_python_files_through_a_config(tree, spec):
    resolved = setup.resolve(config_of(tree, tokenizer=spec, validation_fraction=0.2))
    splits = {}
    for split in ("train", "validation", "all"):
        found = ""
        for row in setup.text_rows(resolved, split, shuffle=False):
            found += resolved.tokenizer.decode(row["tokens"][row["until"] > 0])
        splits[split] = {i for i in range(10) if f"function_{i}" in found}
    assert splits["train"] | splits["validation"] == splits["all"] == set(range(10))
    assert len(splits["validation"]) == 2
    if spec != "bytes":  # a word of the corpus is one token
        assert any("function" in resolved.tokenizer.token_text(i) for i in range(300))


def test_a_limit_is_spread_over_the_files(tree):
    config = config_of(tree, limit=3, validation_fraction=0.0)
    found = setup.records(config.data)
    assert [d.file for d in found] == ["file0.py", "file3.py", "file6.py"]
    assert found[-1] == found[2]
    with pytest.raises(IndexError, match="document 3 of 3"):
        found[3]


def test_python_files_are_no_conversations(tree):
    with pytest.raises(UserError, match="plain text"):
        setup.conversations(config_of(tree).data)
