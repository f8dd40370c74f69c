# SPDX-License-Identifier: Apache-2.0
"""TFDS builders: what is prepared reads back in order, without TensorFlow and without a word."""

import json
import logging
import os
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from lm.data import arithmetic, builders, conversations, gsm8k
from lm.data.messages import Conversation
from lm.errors import DataError, UserError


def records(number):
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": f"answer {i} é\u2028", "reasoning_content": ""},
            ]
        }
        for i in range(number)
    ]


def write(path, values):
    path.write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")
    return str(path)


def prepared(builder):
    builder.download_and_prepare()
    # By the directory alone: that is how another program would open it.
    reader = tfds.builder_from_directory(builder.data_dir)
    data = reader.as_data_source(split=builder.split)
    return [Conversation.from_json(data[i]["conversation"]) for i in range(len(data))]


def test_arithmetic(tmp_path):
    settings = arithmetic.ArithmeticConfig(tools=True)
    for split in arithmetic.SPLITS:
        builder = builders.ArithmeticChat(
            data_dir=tmp_path, size=20, seed=4, split=split, settings=settings
        )
        made = [arithmetic.generate(4, i, settings, split) for i in range(20)]
        assert prepared(builder) == made


def test_gsm8k(tmp_path):
    values = [{"question": f"{i}?", "answer": f"it is {i}\n#### {i}"} for i in range(10)]
    path = write(tmp_path / "train.jsonl", values)
    builder = builders.Gsm8kChat(data_dir=tmp_path, path=path, problems_per_conversation=3, seed=2)
    problems = list(gsm8k.read_problems(path))
    made = list(gsm8k.conversations_of(problems, per_conversation=3, seed=2))
    assert prepared(builder) == made
    assert len(made) == 4


@pytest.mark.parametrize("number", [1, 34, 35])
def test_files_keep_their_order_over_chunks_and_shards(tmp_path, monkeypatch, number):
    monkeypatch.setattr(builders, "_EXAMPLES_PER_SHARD", 7)
    monkeypatch.setattr(builders, "_CHUNK", 3)
    path = write(tmp_path / "data.jsonl", records(number))
    builder = builders.JsonlChat(data_dir=tmp_path, path=path)
    got = prepared(builder)
    assert [c.messages for c in got] == [c.messages for c in conversations.read_conversations(path)]
    assert [c.line for c in got] == list(range(1, number + 1))
    assert builder.info.splits["train"].num_shards == -(-number // 7)


def test_options_and_content_name_the_directory(tmp_path):
    path = write(tmp_path / "a.jsonl", records(2))
    same = write(tmp_path / "b.jsonl", records(2))
    longer = write(tmp_path / "c.jsonl", records(3))

    def directory(path, **options):
        return builders.JsonlChat(data_dir=tmp_path, path=path, **options).data_dir

    base = directory(path)
    assert directory(same) == base
    others = {
        base,
        directory(longer),
        directory(path, on_error="skip"),
        directory(path, delimiters=("<a>", "<b>")),
        directory(path, delimiters=None),
        directory(path, limit=1),
    }
    assert len(others) == 6

    def made(**options):
        return builders.ArithmeticChat(data_dir=tmp_path, **options).data_dir

    settings = arithmetic.ArithmeticConfig(phrasings=3)
    assert len({made(size=1), made(size=2), made(size=1, seed=1), made(size=1, split="validation"),
                made(size=1, settings=settings)}) == 5  # fmt: skip


def test_skipped_records_are_kept_as_metadata(tmp_path):
    path = write(tmp_path / "data.jsonl", [*records(2), {}, *records(1)])
    builder = builders.JsonlChat(data_dir=tmp_path, path=path, on_error="skip")
    assert [c.line for c in prepared(builder)] == [1, 2, 4]
    metadata = tfds.builder_from_directory(builder.data_dir).info.metadata
    assert metadata["skipped"] == 1
    ((line, reason),) = metadata["errors"]
    assert line == 3
    assert reason.startswith("unknown shape")


def test_malformed_records_raise_as_they_are(tmp_path):
    path = write(tmp_path / "data.jsonl", [*records(2), {}])
    builder = builders.JsonlChat(data_dir=tmp_path, path=path)
    with pytest.raises(DataError, match="unknown shape") as error:
        builder.download_and_prepare()
    assert (error.value.file, error.value.line) == (path, 3)
    assert not os.path.exists(builder.data_dir)


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        builders.JsonlChat(data_dir=tmp_path, path=tmp_path / "absent")
    with pytest.raises(UserError, match="no such file"):
        builders.Gsm8kChat(data_dir=tmp_path, path=tmp_path / "absent")
    with pytest.raises(UserError, match="size must be at least 1"):
        builders.ArithmeticChat(data_dir=tmp_path, size=0)


def test_quiet(tmp_path, capfd, caplog):
    path = write(tmp_path / "data.jsonl", [*records(2), {}])
    with caplog.at_level(logging.DEBUG):
        prepared(builders.ArithmeticChat(data_dir=tmp_path, size=3))
        assert not caplog.records
        prepared(builders.JsonlChat(data_dir=tmp_path, path=path, on_error="skip"))
    # Our own warnings pass.
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [f"skipped {path}", path]
    assert capfd.readouterr().out == ""


def test_tensorflow_is_never_imported(tmp_path):
    code = f"""
import sys
from lm.data import builders, sources
source = sources.open_source(sources.ArithmeticData(3), {str(tmp_path)!r})
assert len(list(source)) == 3
assert "tensorflow" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_quiet_in_several_threads_restores_the_log():
    before = absl_logging.get_verbosity()
    first, second = builders.quiet(absl_logging.ERROR), builders.quiet(absl_logging.WARNING)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert absl_logging.get_verbosity() == before
