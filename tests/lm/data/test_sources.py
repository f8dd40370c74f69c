# SPDX-License-Identifier: Apache-2.0
"""Sources: random access, held-out splits, a cache that survives kills, races and full disks."""

import concurrent.futures
import errno
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading

import grain
import numpy as np
import pytest

from lm.data import arithmetic, builders, conversations, sources
from lm.data.sources import ArithmeticData, FileData, Gsm8kData, open_source
from lm.errors import DataError, RunError, UserError


def record(i):
    return {
        "messages": [
            {"role": "user", "content": f"q{i}"},
            {"role": "assistant", "content": f"a{i}"},
        ]
    }


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(record(i)) + "\n" for i in range(20)))
    return str(file)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def never(*_, **__):
    raise AssertionError("prepared again")


def test_arithmetic(cache):
    for split in arithmetic.SPLITS:
        source = open_source(ArithmeticData(7, seed=3, split=split), cache)
        assert list(source) == [arithmetic.generate(3, i, split=split) for i in range(7)]


def test_file(path, cache):
    source = open_source(FileData(path), cache)
    assert list(source) == list(conversations.read_conversations(path))
    assert source[3].file == path
    assert source[3].line == 4


def test_gsm8k(tmp_path, cache):
    file = tmp_path / "train.jsonl"
    values = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(10)]
    file.write_text("\n".join(map(json.dumps, values)))
    source = open_source(Gsm8kData(str(file), problems_per_conversation=2), cache)
    assert len(source) == 5
    lines = {c.messages[0].content: c.line for c in source}
    assert all(lines[q] == int(q[:-1]) + 1 for q in lines)
    assert source[0].file == str(file)


def test_indices(path, cache):
    source = open_source(FileData(path), cache)
    assert source[np.int64(2)] == source[2] == source[-18]
    assert source[-1].line == 20
    for index in (20, -21, np.int64(20)):
        with pytest.raises(IndexError, match="of 20"):
            source[index]
    with pytest.raises(TypeError):
        source["3"]


def test_grain_reads_it(path, cache):
    source = open_source(FileData(path), cache)
    data = grain.MapDataset.source(source).shuffle(seed=1).repeat(2)
    lines = [data[i].line for i in range(len(data))]
    assert sorted(lines) == sorted(list(range(1, 21)) * 2)
    assert [c.line for c in grain.MapDataset.source(source).to_iter_dataset()] == list(range(1, 21))


def test_pickle_and_threads(path, cache):
    source = open_source(FileData(path, validation_fraction=0.2), cache)
    copy = pickle.loads(pickle.dumps(source))
    assert list(copy) == list(source)
    assert repr(copy) == repr(source)
    assert str(cache) not in repr(source)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(copy.__getitem__, range(len(copy)))) == list(source)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_held_out_conversations_lie_evenly(path, cache, fraction):
    lines = {}
    for split in arithmetic.SPLITS:
        data = FileData(path, split=split, validation_fraction=fraction)
        lines[split] = [c.line for c in open_source(data, cache)]
        assert lines[split] == sorted(lines[split])
    assert sorted(lines["train"] + lines["validation"]) == list(range(1, 21))
    step = int(1 / fraction)
    assert lines["validation"] == list(range(step, 21, step))


def test_bad_splits(path, cache):
    with pytest.raises(UserError, match="leaves none for validation"):
        open_source(FileData(path, split="validation"), cache)
    with pytest.raises(UserError, match="leaves none for validation"):
        open_source(FileData(path, split="validation", validation_fraction=0.01), cache)
    for fraction in (1.0, -0.1):
        with pytest.raises(UserError, match="validation_fraction must be"):
            open_source(FileData(path, validation_fraction=fraction), cache)
    for data in (FileData(path, split="test"), ArithmeticData(3, split="test")):
        with pytest.raises(UserError, match="split must be one of train, validation"):
            open_source(data, cache)


def test_prepared_once(path, cache, monkeypatch):
    first = list(open_source(FileData(path), cache))
    monkeypatch.setattr(builders.ConversationBuilder, "_download_and_prepare", never)
    assert list(open_source(FileData(path), cache)) == first
    # Another name for the same content needs no other copy, and is the one that is reported.
    other = os.path.join(os.path.dirname(path), "other.jsonl")
    os.link(path, other)
    assert {c.file for c in open_source(FileData(other), cache)} == {other}
    with pytest.raises(AssertionError, match="prepared again"):
        open_source(FileData(path, limit=3), cache)
    pathlib.Path(path).write_text(json.dumps(record(0)))
    with pytest.raises(AssertionError, match="prepared again"):
        open_source(FileData(path), cache)


def test_changed_code_prepares_anew(path, cache, monkeypatch):
    open_source(FileData(path), cache)
    monkeypatch.setattr(builders, "_code_hash", lambda: "other")
    monkeypatch.setattr(builders.ConversationBuilder, "_download_and_prepare", never)
    with pytest.raises(AssertionError, match="prepared again"):
        open_source(FileData(path), cache)


def test_skips_are_reported_every_time(path, cache, caplog):
    with open(path, "a") as file:
        file.write('{}\n{"messages": []}\n')
    data = FileData(path, on_error="skip")
    for _ in range(2):
        caplog.clear()
        source = open_source(data, cache)
        assert source.skipped == 2
        assert [line for line, _ in source.errors] == [21, 22]
        messages = [r.getMessage() for r in caplog.records]
        assert messages[0].startswith(f"skipped {path}:21: unknown shape")
        assert messages[1] == f"skipped {path}:22: no user message"
        assert messages[2].startswith(f"{path}: skipped 2 ")
        assert len(source) == 20
    with pytest.raises(DataError, match=":21: unknown shape"):
        open_source(FileData(path), cache)


def test_cache_directory_by_environment(path, tmp_path, monkeypatch):
    monkeypatch.setenv("SKIM_CACHE", str(tmp_path / "by_environment"))
    open_source(FileData(path))
    assert (tmp_path / "by_environment" / "datasets" / "jsonl_chat").is_dir()
    monkeypatch.delenv("SKIM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_source(FileData(path))
    assert (tmp_path / "home/.cache/skim/datasets/jsonl_chat").is_dir()


def in_process(code, cache):
    code = f"from lm.data import arithmetic, builders, sources\nCACHE = {str(cache)!r}\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_killed_preparation_is_never_read(cache):
    run = in_process(
        """
import os, signal
builders._CHUNK = 2
generate = arithmetic.generate
def stop(seed, index, *rest):
    if index == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(seed, index, *rest)
arithmetic.generate = stop
sources.open_source(sources.ArithmeticData(9), CACHE)
""",
        cache,
    )
    assert run.returncode == -signal.SIGKILL
    assert list(cache.rglob("incomplete.*"))
    assert list(open_source(ArithmeticData(9), cache)) == [
        arithmetic.generate(0, i) for i in range(9)
    ]
    assert not list(cache.rglob("incomplete.*"))


def test_concurrent_preparation_happens_once(path, cache, monkeypatch):
    prepare = builders.ConversationBuilder._download_and_prepare
    calls = []
    monkeypatch.setattr(
        builders.ConversationBuilder,
        "_download_and_prepare",
        lambda *args, **options: (calls.append(1), prepare(*args, **options)),
    )
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_source(FileData(path), cache), range(4)))
    assert calls == [1]
    assert all(list(source) == list(opened[0]) for source in opened)


def test_file_systems_without_locks(path, cache, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(sources.fcntl, "flock", no_locks)
    prepare = builders.ConversationBuilder._download_and_prepare
    together = threading.Barrier(3, timeout=30)

    def prepare_together(*args, **options):
        prepare(*args, **options)
        together.wait()

    monkeypatch.setattr(builders.ConversationBuilder, "_download_and_prepare", prepare_together)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(lambda _: open_source(FileData(path), cache), range(3)))
    assert all(len(source) == 20 for source in opened)
    assert list(open_source(FileData(path), cache)) == list(opened[0])


def test_failed_write_is_one_line(cache):
    run = in_process(
        """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    sources.open_source(sources.ArithmeticData(300), CACHE)
except Exception as error:
    print(type(error).__name__, error)
""",
        cache,
    )
    assert run.stdout.startswith(f"RunError {cache}: the data cache cannot be written: ")
    assert run.stdout.count("\n") == 1
    assert len(open_source(ArithmeticData(300), cache)) == 300


def test_full_disk(cache, monkeypatch):
    def full(*_):
        raise RuntimeError("write() failed: No space left on device; writing x")

    monkeypatch.setattr(builders.tfds.core.SequentialWriter, "add_examples", full)
    with pytest.raises(RunError, match="cannot be written: No space left on device \\(SKIM_CACHE"):
        open_source(ArithmeticData(3), cache)


def test_what_does_not_read_back_is_not_kept(cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sources.Conversation, "from_json", never)
        with pytest.raises(RunError, match="what was written does not read back"):
            open_source(ArithmeticData(3), cache)
    assert len(list(open_source(ArithmeticData(3), cache))) == 3


def test_cache_that_cannot_be_made(path):
    with pytest.raises(UserError, match="/dev/null/x: the data cache cannot be written: Not a dir"):
        open_source(FileData(path), "/dev/null/x")
