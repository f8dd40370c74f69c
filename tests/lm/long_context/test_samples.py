# SPDX-License-Identifier: Apache-2.0
"""Samples reach their length and never pass it, are the same from the same seed, and refuse what
is too short."""

import dataclasses
import json
import random

import numpy as np
import pytest

from lm.errors import RunError, UserError
from lm.long_context import samples, tasks
from lm.text import tokenizers

ESSAY = tuple(f"word{i % 97}{'.' * (i % 11 == 0)}" for i in range(500))
# tokens of one more unit of the haystack at most, in bytes: a line, a pair, a word thirty times
UNIT = {"kv_retrieval": 84, "cwe": 30 * 25, "fwe": 25, "math_find": 8}
LENGTH = {"cwe": 12000}
BYTES = tokenizers.load_tokenizer("bytes")


@pytest.fixture(scope="module")
def bpe():
    texts = []
    for task in tasks.TASKS.values():
        request = tasks.Request(4096, len, 0, 1, essay_of(task))
        document = task.generate(random.Random(0), max(task.smallest, 60), request)
        texts.append(samples.prompt_of(document))
    return tokenizers.train_bpe(texts, 600)


def essay_of(task):
    return ESSAY if task.essay == "must" else ()


@pytest.mark.parametrize("name", tasks.TASKS)
def test_samples_fill_their_length(name, bpe):
    task = tasks.find(name)
    for tokenizer in (BYTES, bpe):
        length = LENGTH.get(name, 3000 if tokenizer is BYTES else 2500)
        made = samples.samples(task, length, 6, 1, tokenizer, essay_of(task))
        assert [sample.index for sample in made] == list(range(6))
        for sample in made:
            prompt = sample.input + sample.answer_prefix
            assert sample.length == len(tokenizer.encode(prompt)) + task.new_tokens
            assert length - 4 * UNIT.get(name, 120) < sample.length <= length
        # the probe's spread apart, no more than a unit is left over
        assert max(sample.length for sample in made) > length - UNIT.get(name, 120)


@pytest.mark.parametrize("name", ["niah_multikey_2", "vt", "fwe", "math_find", "code_run"])
def test_no_larger_haystack_would_fit(name):
    task = tasks.find(name)
    sizes = {}

    def generate(rng, size, request):
        document = task.generate(rng, size, request)
        sizes[document.context] = size, dataclasses.replace(request)
        return document

    spied = dataclasses.replace(task, generate=generate, search_each=True)
    for sample in samples.samples(spied, 2000, 3, 7, BYTES):
        ((size, request),) = (
            found for text, found in sizes.items() if sample.input.startswith(text)
        )
        rng = random.Random(f"{name}:7:{sample.index}")
        larger = samples.prompt_of(task.generate(rng, size + 1, request))
        assert len(larger) + task.new_tokens > 2000 >= sample.length


def test_same_seed_same_samples_whatever_their_number():
    task = tasks.find("niah_multikey_2")
    first = samples.samples(task, 2000, 5, 3, BYTES)
    assert samples.samples(task, 2000, 5, 3, BYTES) == first
    assert samples.samples(task, 2000, 2, 3, BYTES) == first[:2]
    other = samples.samples(task, 2000, 5, 4, BYTES)
    assert not {sample.input for sample in other} & {sample.input for sample in first}


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name != "cwe"])
def test_too_short_names_the_least_length(name):
    task = tasks.find(name)
    with pytest.raises(UserError, match="too short") as caught:
        samples.samples(task, 60, 4, 1, BYTES, essay_of(task))
    least = int(str(caught.value).rsplit(" ", 1)[1])
    made = samples.samples(task, least, 4, 1, BYTES, essay_of(task))
    assert max(sample.length for sample in made) <= least
    with pytest.raises(UserError, match=f"at least {least}$"):
        samples.samples(task, least - 1, 4, 1, BYTES, essay_of(task))


def test_the_least_length_follows_the_rules_at_that_length():
    # 4,096 bytes are cwe's long form, which they do not hold; below, its short form fits
    task = tasks.find("cwe")
    with pytest.raises(UserError, match="at least 7") as caught:
        samples.samples(task, 4096, 3, 1, BYTES)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    assert max(s.length for s in samples.samples(task, least, 3, 1, BYTES)) == least
    assert samples.samples(task, 4095, 3, 1, BYTES)


def test_essays_go_where_they_are_taken(tmp_path):
    with pytest.raises(UserError, match="hides its needles in an essay"):
        samples.samples(tasks.find("niah_single_2"), 2000, 1, 1, BYTES)
    with pytest.raises(UserError, match="takes no --haystack"):
        samples.samples(tasks.find("passkey"), 2000, 1, 1, BYTES, ESSAY)
    (plain,) = samples.samples(tasks.find("niah_multivalue"), 2000, 1, 1, BYTES)
    (essay,) = samples.samples(tasks.find("niah_multivalue"), 2000, 1, 1, BYTES, ESSAY)
    assert "grass" in plain.input
    assert "word3 " in essay.input
    assert "grass" not in essay.input
    path = tmp_path / "essay.txt"
    with pytest.raises(UserError, match="No such file"):
        samples.read_essay(path)
    path.write_text(" \n")
    with pytest.raises(UserError, match="empty"):
        samples.read_essay(path)
    path.write_text("one two\nthree")
    assert samples.read_essay(path) == ("one", "two", "three")


def test_long_samples_take_few_encodings():
    encoded = []

    class Counting(tokenizers.ByteTokenizer):
        def encode(self, text):
            encoded.append(len(text))
            return super().encode(text)

    for name in ("niah_multikey_2", "kv_retrieval", "fwe", "math_find"):
        encoded.clear()
        samples.samples(tasks.find(name), 131072, 2, 1, Counting())
        assert len([size for size in encoded if size > 30000]) <= 40


def test_files_are_whole_or_not_there(tmp_path):
    task = tasks.find("passkey")
    path = tmp_path / "out.jsonl"
    number, longest = samples.write(path, samples.stream(task, 1000, 3, 1, BYTES))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert number == len(rows) == 3
    assert longest == max(row["length"] for row in rows)
    assert list(rows[0]) == ["index", "input", "outputs", "length", "answer_prefix"]
    before = path.read_bytes()
    with pytest.raises(UserError):
        samples.write(path, samples.stream(task, 10, 3, 1, BYTES))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]
    with pytest.raises(RunError, match="cannot write"):
        samples.write(tmp_path / "no" / "out.jsonl", iter(()))


def test_answers_are_spread_over_the_depths():
    made = samples.samples(tasks.find("passkey"), 8000, 20, 1, BYTES)
    depths = np.array([s.input.index(s.outputs[0]) / len(s.input) for s in made])
    assert np.histogram(depths, bins=5, range=(0, 1))[0].min() >= 3
