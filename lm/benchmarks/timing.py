# SPDX-License-Identifier: Apache-2.0
"""Timing of work that a device does on its own: many calls in a row, waited for at the end.

A sample lasts 20 ms or one call, so starting a call is hidden behind the call before.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

_SAMPLE_SECONDS = 0.02
_MOST_CALLS = 2000


@dataclasses.dataclass
class Stopwatch:
    """Seconds per call of `run`, which starts work that `wait` waits for."""

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    calls: int = 1  # in a sample
    samples: list[float] = dataclasses.field(default_factory=list)
    started: list[float] = dataclasses.field(default_factory=list)  # seconds to start a call

    def calibrate(self) -> None:
        """Warms up, and finds how many calls make a sample."""
        for _ in range(3):
            seconds, _ = self._time()
            self.calls = min(int(_SAMPLE_SECONDS / max(seconds, 1e-9)) + 1, _MOST_CALLS)

    def sample(self) -> None:
        seconds, started = self._time()
        self.samples.append(seconds)
        self.started.append(started)

    def _time(self) -> tuple[float, float]:
        began = time.perf_counter()
        for _ in range(self.calls):
            result = self.run()
        started = time.perf_counter()
        self.wait(result)
        return (time.perf_counter() - began) / self.calls, (started - began) / self.calls

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spent(self) -> float:
        """Seconds of all samples."""
        return sum(self.samples) * self.calls
