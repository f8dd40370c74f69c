# SPDX-License-Identifier: Apache-2.0
"""The generator command: its file, its last line, and what it refuses."""

import json

import pytest

from lm.long_context import tasks
from lm.text import tokenizers
from tests import commands


def generate(path, *flags, **options):
    return commands.run("long_context.generate", f"--out={path}", *flags, **options)[0]


def refusal(path, *flags):
    return commands.refusal("long_context.generate", f"--out={path}", *flags)


def test_the_file_is_what_the_last_line_says(tmp_path):
    flags = ("--task=niah_multikey_2", "--length=4096", "--samples=20", "--seed=1")
    result = generate(tmp_path / "a.jsonl", *flags, "--tokenizer=byte")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert result == {"samples": 20, "max_length": max(row["length"] for row in rows)}
    assert [row["index"] for row in rows] == list(range(20))
    for row in rows:
        assert list(row) == ["index", "input", "outputs", "length", "answer_prefix"]
        prompt = row["input"] + row["answer_prefix"]
        assert row["length"] == len(prompt.encode()) + 128
        assert 3900 < row["length"] <= 4096
        assert row["input"].count(row["outputs"][0]) == 1
        key = row["answer_prefix"].split(" for ")[1].removesuffix(" is:")
        assert f"for {key} is: {row['outputs'][0]}." in row["input"]
        assert tasks.find("niah_multikey_2").score(f" {row['outputs'][0]}", row["outputs"]) == 1
    generate(tmp_path / "b.jsonl", *flags)
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_lengths_are_counted_by_the_tokenizer_named(tmp_path):
    text = "The grass is green. The sky is blue. The sun is yellow."
    tokenizers.train_bpe([text], 300).save(tmp_path / "bpe")
    tokenizer = tokenizers.load_tokenizer(str(tmp_path / "bpe"))
    generate(
        tmp_path / "a.jsonl",
        *("--task=passkey", "--length=700", "--samples=2", f"--tokenizer={tmp_path / 'bpe'}"),
    )
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["length"] == len(tokenizer.encode(row["input"] + row["answer_prefix"])) + 6


def test_an_essay_of_the_users(tmp_path):
    (tmp_path / "essay.txt").write_text("Every sentence of it is short. " * 50)
    flags = ("--task=niah_single_2", "--length=2000", "--samples=2")
    generate(tmp_path / "a.jsonl", *flags, f"--haystack={tmp_path / 'essay.txt'}")
    assert "sentence of it is short." in (tmp_path / "a.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--task=nope", "--length=100"), "unknown task 'nope'; known: niah_single_1"),
        (("--task=vt", "--length=100"), "vt: a length of 100 tokens is too short"),
        (("--task=passkey", "--length=1000", "--samples=0"), "--samples=0 must be at least 1"),
        (("--task=passkey", "--length=1000", "--tokenizer=nope"), "tokenizer nope: no such file"),
    ],
)
def test_refusals(flags, reason, tmp_path):
    assert reason in refusal(tmp_path / "out.jsonl", *flags)
    assert not list(tmp_path.iterdir())


def test_the_least_length_that_is_named_works(tmp_path):
    said = refusal(tmp_path / "out.jsonl", "--task=kv_retrieval", "--length=10", "--samples=3")
    least = int(said.rsplit(" ", 1)[1])
    result = generate(
        tmp_path / "out.jsonl", "--task=kv_retrieval", f"--length={least}", "--samples=3"
    )
    assert result == {"samples": 3, "max_length": least}
