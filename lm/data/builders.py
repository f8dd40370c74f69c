# SPDX-License-Identifier: Apache-2.0
"""TFDS builders of local data, in ArrayRecord form, written and read without TensorFlow.

Every builder keeps its source's order, so record i is the i-th conversation of the source. A
builder's directory is named by a hash of its options and of the content of the file that it reads;
TFDS writes into a temporary directory and renames it, so a preparation that was cut off is never
read.
"""

import abc
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from absl import logging

from lm.data import arithmetic, conversations, gsm8k, messages, records
from lm.data.messages import Conversation
from lm.data.records import Delimiters
from lm.errors import UserError

tfds.disable_progress_bar()

_EXAMPLES_PER_SHARD = 100_000
_CHUNK = 1_000
_ERRORS_KEPT = 1_000


class _LocalInfo(tfds.core.DatasetInfo):
    """TFDS asks a public bucket about every data set that it does not know; not about ours."""

    def initialize_from_bucket(self) -> None:
        pass


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A split of records, each one JSON text under `FIELD`.

    `info.metadata` holds `skipped`, a count of malformed records, and the first of their `errors`
    as [line, reason].
    """

    FIELD: ClassVar[str]
    RECORD: ClassVar[type[Any]]  # what a text becomes: it has `from_json`

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. (TFDS would look for the file of checksums through a package that it
    # does not list among its requirements.)
    url_infos: ClassVar[dict[str, Any]] = {}

    def __init__(self, split: str, options: dict[str, Any], data_dir: str | os.PathLike[str]):
        """options: all that the content depends on, as plain values; they name the directory."""
        self.split = split
        # An exception of our own, which TFDS would wrap on its way out.
        self.failure: Exception | None = None
        text = json.dumps({**options, "split": split, "code": self.code_hash()}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        config = tfds.core.BuilderConfig(name=name, version=str(self.VERSION), description=text)
        with quiet(logging.ERROR):
            super().__init__(
                data_dir=os.fspath(data_dir), config=config, file_format="array_record"
            )

    @abc.abstractmethod
    def texts(self) -> Iterator[str]:
        """The records to write, in order."""

    def code_hash(self) -> str:
        """Of the modules that make the content, so that a change to one of them prepares anew."""
        return _code_hash()

    def errors(self) -> list[tuple[int, str]]:
        """(line, reason) of the records that `texts` skipped so far."""
        return []

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict({self.FIELD: tfds.features.Text()}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        return {self.split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        try:
            for index, text in enumerate(self.texts()):
                yield index, {self.FIELD: text}
        except Exception as error:
            self.failure = error
            raise

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        # The writer that TFDS would use sorts in memory, and needs TensorFlow beyond a gigabyte;
        # this one streams.
        info = self._info()  # of the temporary directory that is `data_dir` for now
        writer = tfds.core.SequentialWriter(info, _EXAMPLES_PER_SHARD, file_format="array_record")
        generators = self._split_generators(dl_manager)
        writer.initialize_splits(list(generators))
        for split, examples in generators.items():
            while chunk := [example for _, example in itertools.islice(examples, _CHUNK)]:
                with _write_errors():
                    writer.add_examples({split: chunk})
        with _write_errors():
            writer.close_all()
        self.info.set_splits(info.splits)
        errors = self.errors()
        self.info.metadata.update(skipped=len(errors), errors=errors[:_ERRORS_KEPT])

    def download_and_prepare(self, **options: Any) -> None:
        """Prepares the data unless that has been done; options as in TFDS. Downloads nothing."""
        options.setdefault("download_config", tfds.download.DownloadConfig(try_download_gcs=False))
        self.failure = None
        with quiet(logging.WARNING):
            try:
                super().download_and_prepare(**options)
            except Exception as error:
                if self.failure is not None:
                    raise self.failure from None
                raise error

    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


class ConversationBuilder(RecordBuilder, skip_registration=True):
    """A split of conversations, each one JSON text (`Conversation.to_json`)."""

    FIELD, RECORD = "conversation", Conversation

    @abc.abstractmethod
    def conversations(self) -> Iterator[Conversation]:
        """The conversations to write, in order."""

    def texts(self) -> Iterator[str]:
        for conversation in self.conversations():
            yield conversation.to_json()


class ArithmeticChat(ConversationBuilder):
    """Multi-turn arithmetic made from a seed (`lm.data.arithmetic`)."""

    def __init__(
        self,
        *,
        data_dir: str | os.PathLike[str],
        size: int,
        seed: int = 0,
        split: arithmetic.Split = "train",
        settings: arithmetic.ArithmeticConfig | None = None,
    ):
        if size < 1:
            raise UserError(f"size must be at least 1, got {size}")
        self.size, self.seed = size, seed
        self.settings = settings or arithmetic.ArithmeticConfig()
        options = {"size": size, "seed": seed, **dataclasses.asdict(self.settings)}
        super().__init__(split, options, data_dir)

    def conversations(self) -> Iterator[Conversation]:
        for index in range(self.size):
            yield arithmetic.generate(self.seed, index, self.settings, self.split)


class Gsm8kChat(ConversationBuilder):
    """Multi-turn conversations of word problems from a local GSM8K file (`lm.data.gsm8k`)."""

    def __init__(
        self,
        *,
        data_dir: str | os.PathLike[str],
        path: str | os.PathLike[str],
        problems_per_conversation: int = 4,
        seed: int = 0,
        on_error: str = "stop",
    ):
        self.problems = gsm8k.read_problems(path, on_error=on_error)
        self.per_conversation, self.seed = problems_per_conversation, seed
        options = {
            "content": content_hash(path),
            "per_conversation": problems_per_conversation,
            "seed": seed,
            "on_error": on_error,
        }
        super().__init__("train", options, data_dir)

    def conversations(self) -> Iterator[Conversation]:
        return gsm8k.conversations_of(
            list(self.problems), per_conversation=self.per_conversation, seed=self.seed
        )

    def errors(self) -> list[tuple[int, str]]:
        return self.problems.errors


class JsonlChat(ConversationBuilder):
    """A user's file of conversations (`lm.data.conversations`), in the file's order."""

    def __init__(
        self,
        *,
        data_dir: str | os.PathLike[str],
        path: str | os.PathLike[str],
        on_error: str = "stop",
        delimiters: Delimiters = ("<think>", "</think>"),
        limit: int | None = None,
    ):
        self.reader = conversations.read_conversations(
            path, on_error=on_error, delimiters=delimiters, limit=limit
        )
        options = {
            "content": content_hash(path),
            "on_error": on_error,
            "delimiters": delimiters,
            "limit": limit,
        }
        super().__init__("train", options, data_dir)

    def conversations(self) -> Iterator[Conversation]:
        # The directory is named by content, so one copy serves a file under any name.
        for conversation in self.reader:
            yield dataclasses.replace(conversation, file="")

    def errors(self) -> list[tuple[int, str]]:
        return self.reader.errors


def content_hash(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, and whether its name says that it is gzip."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{digest}{'.gz' * os.fspath(path).endswith('.gz')}"


@functools.cache
def _code_hash() -> str:
    """Of the modules that make conversations."""
    modules = (arithmetic, conversations, gsm8k, messages, records)
    digest = hashlib.sha256()
    for module in modules:
        digest.update(pathlib.Path(module.__file__).read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _write_errors() -> Iterator[None]:
    """ArrayRecord reports a failed write as a RuntimeError whose text names the cause."""
    try:
        yield
    except RuntimeError as error:
        full = os.strerror(errno.ENOSPC) in str(error)
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, os.strerror(code) if full else str(error)) from error


_quiet_lock = threading.Lock()
_quiet_levels: list[int] = []  # of the threads that are inside
_loud = logging.WARNING  # what to return to when the last one leaves


@contextlib.contextmanager
def quiet(level: int) -> Iterator[None]:
    """Keeps TFDS's chatter out of the run's log: only messages of `level` and above pass.

    Several threads may be inside at once; the last to leave restores what the first found.
    """
    global _loud
    with _quiet_lock:
        if not _quiet_levels:
            _loud = logging.get_verbosity()
        _quiet_levels.append(level)
        logging.set_verbosity(min(_loud, *_quiet_levels))
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_levels.remove(level)
            logging.set_verbosity(min([_loud, *_quiet_levels]))
