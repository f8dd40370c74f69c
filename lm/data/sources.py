# SPDX-License-Identifier: Apache-2.0
"""Random access to conversations and documents: prepared once by a TFDS builder, then read from a
cache.

`ArithmeticData`, `Gsm8kData` and `FileData` say where conversations come from, `PythonData` where
documents do; `open_source` turns one into a `ConversationSource` or a `DocumentSource`, which
`grain.MapDataset.source` takes.
"""

import contextlib
import dataclasses
import errno
import fcntl
import operator
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import IO, Any, ClassVar, Generic, SupportsIndex, TypeVar, overload

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from lm.data import builders, python_source
from lm.data.arithmetic import SPLITS, ArithmeticConfig, Split
from lm.data.messages import Conversation
from lm.data.python_source import Document
from lm.data.records import Delimiters
from lm.errors import RunError, UserError

_RUN_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@dataclasses.dataclass(frozen=True)
class ArithmeticData:
    """`size` generated conversations."""

    size: int
    seed: int = 0
    split: Split = "train"
    settings: ArithmeticConfig = ArithmeticConfig()

    def builder(self, data_dir: str) -> builders.ConversationBuilder:
        return builders.ArithmeticChat(data_dir=data_dir, **_fields(self))


@dataclasses.dataclass(frozen=True)
class Gsm8kData:
    """A local GSM8K file; `validation_fraction` of its conversations are held out."""

    path: str
    problems_per_conversation: int = 4
    seed: int = 0
    on_error: str = "stop"
    split: Split = "train"
    validation_fraction: float = 0.0

    def builder(self, data_dir: str) -> builders.ConversationBuilder:
        fields = _fields(self, "split", "validation_fraction")
        return builders.Gsm8kChat(data_dir=data_dir, **fields)


@dataclasses.dataclass(frozen=True)
class FileData:
    """A user's file; `validation_fraction` of its conversations are held out."""

    path: str
    on_error: str = "stop"
    delimiters: Delimiters = ("<think>", "</think>")
    limit: int | None = None
    split: Split = "train"
    validation_fraction: float = 0.0

    def builder(self, data_dir: str) -> builders.ConversationBuilder:
        fields = _fields(self, "split", "validation_fraction")
        return builders.JsonlChat(data_dir=data_dir, **fields)


@dataclasses.dataclass(frozen=True)
class PythonData:
    """Python files: the standard library's, or all below `directories`; `validation_fraction` of
    the files are held out. near: see `python_source.Reader`."""

    directories: tuple[str, ...] = ()
    site_packages: bool = False
    near: float = 0.8
    split: Split = "train"
    validation_fraction: float = 0.0

    def builder(self, data_dir: str) -> python_source.PythonSource:
        fields = _fields(self, "split", "validation_fraction")
        return python_source.PythonSource(data_dir=data_dir, **fields)


ConversationData = ArithmeticData | Gsm8kData | FileData
Data = ConversationData | PythonData
R = TypeVar("R", Conversation, Document)


class _Source(Sequence[R], Generic[R]):
    """Prepared records by index, in the order of what they were made from.

    It pickles as the place of its files, and serves several threads. skipped: how many malformed
    records of the file were left out; errors: (line, reason) of the first of them.
    """

    _record: ClassVar[type[Any]]

    def __init__(self, directory: str, file: str | None, split: Split, fraction: float):
        """file: the name that records report, None for the one that was prepared."""
        self._directory, self._file = directory, file
        self._split, self._fraction = split, fraction
        self._open()

    def _open(self) -> None:
        with builders.quiet(logging.ERROR):
            builder = tfds.builder_from_directory(self._directory)
            (name,) = builder.info.splits
            (self._field,) = builder.info.features
            self._data = builder.as_data_source(split=name)
        metadata = builder.info.metadata
        self.skipped: int = metadata["skipped"]
        self.errors: list[tuple[int, str]] = [(line, reason) for line, reason in metadata["errors"]]
        self._indices = held_out_or_not(len(self._data), self._split, self._fraction)

    def __len__(self) -> int:
        return len(self._data) if self._indices is None else len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> R:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self._field} {number} of {len(self)}")
        number %= len(self)
        if self._indices is not None:
            number = int(self._indices[number])
        record = self._record.from_json(self._data[number][self._field])
        if self._file is None:
            return record
        return dataclasses.replace(record, file=self._file)

    def __getstate__(self) -> tuple[Any, ...]:
        return (self._directory, self._file, self._split, self._fraction)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._directory, self._file, self._split, self._fraction = state
        self._open()

    def __repr__(self) -> str:
        # A data iterator's saved position names its source, wherever the cache lies.
        key = pathlib.Path(self._directory).parent.name
        return f"{type(self).__name__}({key}, {self._split}, {self._fraction})"


class ConversationSource(_Source[Conversation]):
    """Prepared conversations."""

    _record = Conversation


class DocumentSource(_Source[Document]):
    """Prepared documents; `skipped` are files that could not be read."""

    _record = Document


@overload
def open_source(
    data: ConversationData, cache_dir: str | os.PathLike[str] | None = None
) -> ConversationSource: ...


@overload
def open_source(
    data: PythonData, cache_dir: str | os.PathLike[str] | None = None
) -> DocumentSource: ...


def open_source(
    data: Data, cache_dir: str | os.PathLike[str] | None = None
) -> ConversationSource | DocumentSource:
    """Prepares `data` in the cache unless it is there, and opens it.

    cache_dir: by default the environment's SKIM_CACHE, else ~/.cache/skim. Processes that share one
      wait for whichever of them prepares.

    Raises:
      DataError, UserError: the file is bad (see `read_conversations`), the split is empty, or the
        cache cannot be written for lack of permission.
      RunError: the disk is full or broken.
    """
    if data.split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {data.split!r}")
    root = pathlib.Path(cache_dir or os.environ.get("SKIM_CACHE") or "~/.cache/skim").expanduser()
    file = os.fspath(data.path) if isinstance(data, Gsm8kData | FileData) else None
    fraction = 0.0 if isinstance(data, ArithmeticData) else data.validation_fraction
    if not 0 <= fraction < 1:
        raise UserError(f"validation_fraction must be at least 0 and below 1, got {fraction}")
    builder = data.builder(os.fspath(root / "datasets"))
    with _cache_errors(root):
        fresh = _prepare(builder)
    held_out = "train" if isinstance(data, ArithmeticData) else data.split
    if isinstance(data, PythonData):
        return DocumentSource(builder.data_dir, None, held_out, fraction)
    source = ConversationSource(builder.data_dir, file, held_out, fraction)
    if source.skipped and not fresh:
        for line, reason in source.errors:
            logging.warning("skipped %s:%d: %s", file, line, reason)
        logging.warning("%s: skipped %d malformed records", file, source.skipped)
    return source


def held_out_or_not(size: int, split: Split, fraction: float) -> np.ndarray | None:
    """The indices of a split, int64; the held-out ones lie evenly. None stands for all of them."""
    if split == "train" and not fraction:
        return None
    counts = np.floor(np.arange(size + 1) * fraction)
    held_out = counts[1:] > counts[:-1]
    (indices,) = np.nonzero(held_out if split == "validation" else ~held_out)
    if not len(indices):
        raise UserError(
            f"validation_fraction={fraction} of {size} conversations leaves none for {split}"
        )
    return indices


def _fields(data: Data, *without: str) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(data) if f.name not in without]
    return {name: getattr(data, name) for name in names}


def _prepare(builder: builders.RecordBuilder) -> bool:
    """Prepares the builder's directory unless it is there; whether this call did it."""
    directory = pathlib.Path(builder.data_dir)
    if directory.exists():
        return False
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / ".lock", "w") as lock:
        locked = _lock(lock)
        if directory.exists():
            return False
        if locked:
            # Whoever holds the lock is the only writer: these are left from preparations cut off.
            for remains in directory.parent.glob("incomplete.*"):
                shutil.rmtree(remains, ignore_errors=True)
        try:
            builder.download_and_prepare()
        except OSError:
            if directory.exists():  # without a lock, another process can be the first to finish
                return False
            raise
        _check(builder)
    return True


def _lock(file: IO[str]) -> bool:
    """Waits for the lock; False where the file system has none, and work may be done twice."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return False
    return True


def _check(builder: builders.RecordBuilder) -> None:
    """Reads the last record back: a disk that filled up need not have failed any write."""
    for split in builder.info.splits:
        data = builder.as_data_source(split=split)
        try:
            builder.RECORD.from_json(data[len(data) - 1][builder.FIELD])
        except Exception as error:
            shutil.rmtree(builder.data_dir, ignore_errors=True)
            raise OSError(errno.EIO, "what was written does not read back") from error


@contextlib.contextmanager
def _cache_errors(root: pathlib.Path) -> Iterator[None]:
    """Turns what the operating system says about the cache into one line."""
    try:
        yield
    except OSError as error:
        kind = RunError if error.errno in _RUN_ERRNOS else UserError
        reason = error.strerror or error
        raise kind(
            f"{root}: the data cache cannot be written: {reason} (SKIM_CACHE names another place)"
        ) from error
