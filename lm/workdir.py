# SPDX-License-Identifier: Apache-2.0
"""A run's directory: config.json, env.json, metrics.jsonl, eval.jsonl, checkpoints/, plots/,
report.html."""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any, BinaryIO, TypeVar

import jax
from absl import logging
from tensorboardX import SummaryWriter

from lm.config import Config, freeze, to_dict
from lm.errors import RunError, UserError

C = TypeVar("C", bound=Config)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Workdir:
    """Paths and append-only records of one run. Only process 0 writes."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._board: SummaryWriter | None = None

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    def create(self, config: Config) -> None:
        """Makes the directory; says what differs from an earlier run in it. Raises UserError."""
        if config.init_from and os.path.realpath(config.init_from) == os.path.realpath(self.path):
            raise UserError(f"init_from is the workdir itself, {self.path}: take another --workdir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "plots").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create workdir {self.path}: {error.strerror}") from error
        if not jax.process_index() and (self.path / "config.json").exists():
            _log_differences(to_dict(self.config(type(config))), to_dict(config))

    def refuse_run(self) -> None:
        """Raises UserError where a run was trained here: the config of what holds several runs
        would replace its own."""
        if self.checkpoints.exists():
            raise UserError(
                f"{self.path} holds a trained run: take another --workdir, in which models get "
                "folders of their own"
            )

    def record(self, config: Config) -> None:
        """Writes config.json and env.json: once it is sure that this config can run here."""
        if jax.process_index():
            return
        self.write("config.json", json.dumps(to_dict(config), indent=2) + "\n")
        self.write("env.json", json.dumps(environment(), indent=2) + "\n")

    def config(self, cls: type[C] = Config) -> C:
        """The config of the run that made this directory, without sections that `cls` lacks: those
        are another method's."""
        values = self._record()
        known = {field.name for field in dataclasses.fields(cls)}
        other = {k for k, v in values.items() if isinstance(v, dict) and k not in known}
        return freeze({k: v for k, v in values.items() if k not in other}, cls)

    def sections(self) -> frozenset[str]:
        """The names of the config's sections, which tell what made this directory."""
        return frozenset(k for k, v in self._record().items() if isinstance(v, dict))

    def _record(self) -> dict[str, Any]:
        try:
            values = json.loads((self.path / "config.json").read_text())
        except OSError as error:
            raise UserError(f"{self.path} is not a workdir: no readable config.json") from error
        except ValueError as error:
            raise UserError(f"{self.path}/config.json: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{self.path}/config.json: not a JSON object")
        return values

    def write(self, name: str, text: str) -> None:
        """Writes a whole file, atomically."""
        target = self.path / name
        partial = target.with_name(target.name + ".partial")
        try:
            partial.write_text(text)
            partial.replace(target)
        except OSError as error:
            raise RunError(f"cannot write {target}: {error.strerror}") from error

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Appends one JSON line to metrics.jsonl, eval.jsonl or benchmark.jsonl.

        A line that a kill cut short is ended before it.
        """
        if jax.process_index():
            return
        target = self.path / name
        try:
            with target.open("ab+") as f:
                f.write(("\n" * _torn(f) + json.dumps(row) + "\n").encode())
        except OSError as error:
            raise RunError(f"cannot write {target}: {error.strerror}") from error

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The JSON lines of a file; a line cut short by a kill is dropped with a message."""
        target = self.path / name
        if not target.exists():
            return []
        rows = []
        for number, line in enumerate(target.read_text().splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                logging.warning("%s:%d: incomplete line ignored", target, number)
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Drops rows past `step`, so that a resumed run writes them again and once only."""
        if jax.process_index():
            return
        rows = self.rows("metrics.jsonl")
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) != len(rows):
            self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """A row of metrics.jsonl and the same TensorBoard scalars."""
        if jax.process_index():
            return
        self.append("metrics.jsonl", {"step": step, **values})
        try:
            if self._board is None:
                self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.path}/tensorboard: {error.strerror}") from error

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def environment() -> dict[str, Any]:
    """Versions, commit, devices and date: what a result needs to be understood later."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": commit(),
        "backend": devices[0].platform,
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "num_processes": jax.process_count(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": _now(),
    }


def provenance() -> dict[str, Any]:
    """What it takes to understand a row later: command, commit, device and date."""
    return {**_unchanging(), "date": _now()}


@functools.cache
def _unchanging() -> dict[str, Any]:
    found = environment()
    return {name: found[name] for name in ("command", "commit", "device")}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit() -> str | None:
    """The short git hash of this code, with "+" when the tree has changes; None outside a
    checkout."""
    root = pathlib.Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()


def _torn(file: BinaryIO) -> bool:
    """Whether the last line of a file has no end."""
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _log_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> None:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            _log_differences(before, after, f"{prefix}{key}.")
        elif json.dumps(before) != json.dumps(after):
            logging.warning(
                "config changed since the last run: %s%s: %r -> %r", prefix, key, before, after
            )
