# SPDX-License-Identifier: Apache-2.0
"""Long work in calls of limited time: what a call has left, and training that stops with it."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator

from lm.errors import RunError
from lm.progress import say

_STOPPED = 143  # exit status of a training loop that saved and left
_AGAIN = 1.0  # seconds between signals: one that comes before the loop listens is lost


class OutOfTime(Exception):
    """A call has no time left. What had ended by then is kept, the same call goes on."""


@dataclasses.dataclass(frozen=True)
class Clock:
    """Counts down from when it was made."""

    minutes: float | None = None  # None: no limit
    began: float = dataclasses.field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds."""
        if self.minutes is None:
            return math.inf
        return 60 * self.minutes - (time.monotonic() - self.began)

    def check(self) -> None:
        """Raises OutOfTime when nothing is left."""
        if self.left() <= 0:
            raise OutOfTime


UNLIMITED = Clock()


def train(clock: Clock, call: Callable[[], object]) -> bool:
    """Runs a training that goes on where it was, and whether it ended; when the clock runs out it
    saves and stops.

    Raises SystemExit as the loop does, when something else than the clock asked it to stop.
    """
    if clock.left() <= 0:
        return False
    try:
        with _signalled(clock.left()):
            call()
    except SystemExit as error:
        if error.code != _STOPPED or clock.left() > 0:
            raise
        say("out of time; everything is saved, the same command goes on")
        return False
    return True


@contextlib.contextmanager
def _signalled(seconds: float) -> Iterator[None]:
    """Sends this process SIGTERM after so long, as soon as a training loop listens."""
    if math.isinf(seconds):
        yield
        return

    def passed_on(*_):
        if callable(signal.getsignal(signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)

    try:
        previous = signal.signal(signal.SIGALRM, passed_on)
    except ValueError as error:
        raise RunError("a time limit needs the main thread") from error
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
