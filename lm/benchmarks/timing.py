# SPDX-License-Identifier: Apache-2.0
"""Timing of work that a device does on its own: many calls in a row, waited for at the end.

A sample lasts 20 ms or one call, so starting a call is hidden behind the call before.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

_SAMPLE_SECONDS = 0.02
_MOST_CALLS = 2000
_FEWEST = 3  # samples, however long they take


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

    def summary(self) -> dict[str, float]:
        """The middle half of the samples, in milliseconds per call, and how they were taken."""
        low, median, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return {
            "ms": 1e3 * median,
            "ms_p25": 1e3 * low,
            "ms_p75": 1e3 * high,
            "start_ms": 1e3 * statistics.median(self.started),
            "samples": len(self.samples),
            "calls": self.calls,
        }


def rounds(watches: Sequence[Stopwatch], repeats: int, seconds: float) -> None:
    """Warms all up, then takes a sample of each in turn, so that a change of clocks meets all of
    them; about `seconds` of each, at most `repeats` samples."""
    for watch in watches:
        watch.calibrate()
    for _ in range(repeats):
        for watch in watches:
            if len(watch.samples) < _FEWEST or watch.spent < seconds:
                watch.sample()
