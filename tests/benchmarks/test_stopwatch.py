"""What a stopwatch counts, and when it waits for the device."""

import time

import pytest

from benchmarks.stopwatch import Stopwatch


def test_uses_add_up(monkeypatch):
    ticks = iter(range(1000))  # each reading of the clock is a second later
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    watch = Stopwatch()
    for _ in range(2):
        with watch.time():
            pass
    assert (watch.seconds, watch.uses) == (2.0, 2)
    watch.reset()
    assert (watch.seconds, watch.uses) == (0.0, 0)


def test_it_waits_for_the_device_before_and_after():
    events = []
    watch = Stopwatch(lambda: events.append("wait"))
    with watch.time():
        events.append("work")
    assert events == ["wait", "work", "wait"]


def test_time_is_counted_when_work_fails():
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch.time():
        _ = 1 / 0
    assert watch.uses == 1
    assert watch.seconds > 0
