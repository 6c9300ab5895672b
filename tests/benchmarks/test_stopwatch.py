"""What a stopwatch counts, and when it waits for the device."""

import time

import pytest

from benchmarks.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by one second per reading."""
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.usefixtures("clock")
def test_nested_uses_are_counted_once():
    watch = Stopwatch()
    with watch, watch.time(), watch:
        pass
    with watch:
        pass
    assert (watch.seconds, watch.uses) == (2.0, 4)
    watch.reset()
    assert (watch.seconds, watch.uses) == (0.0, 0)


def test_it_waits_for_the_device_before_and_after():
    events = []
    watch = Stopwatch(lambda: events.append("wait"))
    with watch:
        events.append("work")
        with watch:
            events.append("work")
    assert events == ["wait", "work", "work", "wait"]


def test_time_is_counted_when_work_fails():
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch:
        _ = 1 / 0
    with watch:
        pass
    assert watch.uses == 2
    assert watch.seconds > 0
