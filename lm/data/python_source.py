# SPDX-License-Identifier: Apache-2.0
"""The Python source on this machine as a corpus of real code that needs no download.

The standard library of the running interpreter, installed packages on request, or any directory of
Python files. Exact and near copies are left out: the standard library repeats itself (tables of
encodings, tests that differ in a line), and what stands in both splits would measure memory.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from typing import Any, Self

from lm.data import builders
from lm.errors import UserError

MAX_BYTES = 1 << 20  # longer files are generated tables
_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "lib-dynload"}
_SHORTEST_LINE = 12  # shorter ones (`else:`, `return x`) say nothing about copying


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, and the name of the file that it came from."""

    text: str
    file: str = ""

    def to_json(self) -> str:
        return json.dumps({"text": self.text, "file": self.file}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


def roots(site_packages: bool = False) -> tuple[pathlib.Path, ...]:
    """Where the standard library lies, and the installed packages if they are wanted."""
    paths = sysconfig.get_paths()
    names = ["stdlib", *(["purelib", "platlib"] if site_packages else [])]
    return tuple(dict.fromkeys(pathlib.Path(paths[name]).resolve() for name in names))


def find(directories: Sequence[str | os.PathLike[str]]) -> list[tuple[str, pathlib.Path]]:
    """(name, path) of every .py file below the directories, by name; names are relative to them.

    Installed packages below a standard library are no part of it. Raises UserError when a directory
    is not there or none holds a Python file.
    """
    found: dict[str, pathlib.Path] = {}
    for root in map(pathlib.Path, directories):
        if not root.is_dir():
            raise UserError(f"{root}: no such directory")
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - _SKIPPED)
            for file in files:
                path = pathlib.Path(folder, file)
                if file.endswith(".py") and path.is_file():
                    name = path.relative_to(root).as_posix()
                    found.setdefault(name.encode(errors="replace").decode(), path)
    if not found:
        raise UserError(f"no Python files in {', '.join(map(os.fspath, directories))}")
    return sorted(found.items())


class Reader:
    """Iterates over documents without their copies; `errors` are those left out as unreadable."""

    def __init__(self, files: Sequence[tuple[str, pathlib.Path]], near: float):
        """near: a file is a copy when so large a share of its lines stands in earlier files."""
        self._files, self._near = files, near
        self.errors: list[tuple[int, str]] = []
        self.copies = 0

    def __iter__(self) -> Iterator[Document]:
        self.errors, self.copies = [], 0
        seen: set[int] = set()
        for name, path in self._files:
            try:
                text = _read(path)
            except (SyntaxError, ValueError, LookupError, OSError) as error:
                self.errors.append((0, f"{name}: {error}"))
                continue
            if not text.strip():
                continue
            lines = {hash(line) for line in _lines(text)}
            # a file of short lines only is compared whole
            lines = lines or {hash(text.strip())}
            if len(lines & seen) >= self._near * len(lines):
                self.copies += 1
                continue
            seen |= lines
            yield Document(text, name)


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        line = line.strip()
        if len(line) >= _SHORTEST_LINE and not line.startswith("#"):
            yield line


def _read(path: pathlib.Path) -> str:
    """The text under the encoding that the file declares. Raises SyntaxError, ValueError, OSError
    or LookupError."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES} bytes")
    with tokenize.open(path) as file:
        text = file.read()
    text.encode("utf-8")  # an odd encoding can decode to what UTF-8 cannot hold
    return text


class PythonSource(builders.RecordBuilder):
    """Python files, one document each, by name."""

    FIELD, RECORD = "document", Document

    def __init__(
        self,
        *,
        data_dir: str | os.PathLike[str],
        directories: Sequence[str] = (),
        site_packages: bool = False,
        near: float = 0.8,
    ):
        """directories: read these instead of the standard library and the installed packages."""
        if not 0 < near <= 1:
            raise UserError(f"near must be above 0 and at most 1, got {near}")
        files = find(directories or roots(site_packages))
        self.reader = Reader(files, near)
        options: dict[str, Any] = {"content": _digest(files), "near": near}
        super().__init__("train", options, data_dir)

    def code_hash(self) -> str:
        return hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()

    def texts(self) -> Iterator[str]:
        for document in self.reader:
            yield document.to_json()

    def errors(self) -> list[tuple[int, str]]:
        return self.reader.errors


def _digest(files: Sequence[tuple[str, pathlib.Path]]) -> str:
    """Of the names and contents; a file that cannot be read counts by its name."""
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name}\0".encode())
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError:
            continue
    return digest.hexdigest()
