# SPDX-License-Identifier: Apache-2.0
"""Trainings that stop with the clock, and only with the clock."""

import signal
import time

import pytest

from lm import stages
from lm.stages import Clock


def training(seconds, starts=0.0):
    """Like the training loop: saves and leaves on SIGTERM, once it listens."""

    def call():
        time.sleep(starts)
        asked = []
        previous = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.01)
                if asked:
                    raise SystemExit(143)
        finally:
            signal.signal(signal.SIGTERM, previous)

    return call


def test_a_training_that_ends_in_time():
    assert stages.train(Clock(), training(0.02))
    assert stages.train(Clock(1.0), training(0.02))
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("starts", [0.0, 0.2], ids=["listening", "compiling"])
def test_the_clock_stops_it(starts, monkeypatch):
    monkeypatch.setattr(stages, "_AGAIN", 0.05)
    before = signal.getsignal(signal.SIGALRM)
    assert not stages.train(Clock(0.1 / 60), training(20.0, starts))
    assert signal.getsignal(signal.SIGALRM) is before


def test_nothing_begins_without_time():
    clock = Clock(1e-9)
    time.sleep(0.001)
    assert not stages.train(clock, lambda: pytest.fail("it began"))


def test_another_reason_to_stop_is_passed_on():
    def call():
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        stages.train(Clock(1.0), call)
