# SPDX-License-Identifier: Apache-2.0
"""Items that Python makes, made in processes beside this one: threads would take turns, and a fast
accelerator would wait for them."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import operator
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import process
from typing import Any, SupportsIndex

from lm.errors import RunError

_LEAST_CORES, _MOST = 4, 6  # one makes half a million tokens a second
_BLOCK = 16  # items that go from one process to another at a time
_here: dict[str, Sequence[Any]] = {}  # in a worker: what it makes items of


def workers() -> int:
    """Processes that are worth it on this machine; 0: none, with few cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MOST, cores - 2) if cores and cores >= _LEAST_CORES else 0


class Beside(Sequence[Any]):
    """What `make()` gives, made in `count` processes a few blocks ahead of who reads it in order;
    item i is the same for any number.

    Processes start with the first item.
    """

    def __init__(self, make: Callable[[], Sequence[Any]], count: int):
        """make: can be pickled, and gives items that can. Called here too, to refuse what it
        refuses."""
        self._make, self._count, self._items = make, count, make()
        self._lock = threading.Lock()
        self._blocks: dict[int, concurrent.futures.Future[list[Any]]] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)  # a data iterator's saved position names its source

    def __getitem__(self, index: SupportsIndex) -> Any:
        block, place = divmod(operator.index(index), _BLOCK)
        try:
            with self._lock:
                found = self._wanted(block)
            return found.result()[place]
        except process.BrokenProcessPool:
            raise RunError("a process that prepares training data died (out of memory?)") from None

    def _wanted(self, block: int) -> concurrent.futures.Future[list[Any]]:
        last = min(block + 2 * self._count, (len(self) - 1) // _BLOCK)
        for number in range(block, last + 1):
            if number not in self._blocks:
                span = number * _BLOCK, min((number + 1) * _BLOCK, len(self))
                with _no_program():
                    self._blocks[number] = self._pool.submit(_items, *span)
        for number in [n for n in self._blocks if not block - 1 <= n <= last]:
            self._blocks.pop(number).cancel()
        return self._blocks[block]

    @functools.cached_property
    def _pool(self) -> concurrent.futures.ProcessPoolExecutor:
        return concurrent.futures.ProcessPoolExecutor(
            self._count,
            # a fork of a process that has threads, as JAX's has, may hang
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(self._make,),
        )


@contextlib.contextmanager
def _no_program() -> Iterator[None]:
    """Processes that start here do not import the program again: they need none of it, and all of
    them would wait for its libraries."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def _start(make: Callable[[], Sequence[Any]]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the first process decides when to stop
        signal.signal(number, signal.SIG_IGN)
    # a process is one worker: the tokenizer's own threads would only stand in each other's way
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _here["items"] = make()


def _items(first: int, end: int) -> list[Any]:
    return [_here["items"][index] for index in range(first, end)]
