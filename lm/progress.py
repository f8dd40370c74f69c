# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar with rate and ETA on a terminal, log lines otherwise. Always on
stderr."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from tqdm import tqdm


class Progress:
    """Counts steps from `start` to `total` (None: unknown)."""

    def __init__(self, name: str, total: int | None, start: int = 0, every: float = 10.0):
        self._name, self._total, self._count, self._start = name, total, start, start
        self._every, self._began = every, time.monotonic()
        self._last = self._began
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, desc=name, leave=False) if terminal else None

    def advance(self, count: int = 1, values: Mapping[str, float] | None = None) -> None:
        """Moves on; without a terminal a line is written every few seconds and at the end."""
        self._count += count
        shown = {key: f"{value:.4g}" for key, value in (values or {}).items()}
        if self._bar is not None:
            self._bar.update(count)
            if shown:
                self._bar.set_postfix(shown, refresh=False)
            return
        now = time.monotonic()
        if now - self._last >= self._every or self._count == self._total:
            self._last = now
            self._line(now, shown)

    def _line(self, now: float, shown: Mapping[str, str]) -> None:
        rate = (self._count - self._start) / max(now - self._began, 1e-9)
        total = "" if self._total is None else f"/{self._total}"
        eta = ""
        if self._total is not None and rate > 0:
            eta = f", {max(self._total - self._count, 0) / rate:.0f} s left"
        values = "".join(f" {key}={value}" for key, value in shown.items())
        say(f"{self._name} {self._count}{total} ({rate:.2f}/s{eta}){values}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def say(text: str) -> None:
    """One line for a person, on stderr: stdout belongs to results."""
    tqdm.write(text, file=sys.stderr)
