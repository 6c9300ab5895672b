"""The default ratio that follows load, on a clock of its own."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.server.grids import grid_preview
from vitcop_server import default_ratio
from vitcop_server.default_ratio import ElasticDefault, default_ratio_of
from vitcop_server.elastic import LEVELS, ElasticRatio, check_elastic, ratios_of
from vitcop_server.metrics import DEFAULT_RATIO
from vitcop_server.settings import ElasticSettings
from vitcop_vllm.pruning.amount import FixedRatio
from vitcop_vllm.pruning.settings import PruningSettings

SETTINGS = ElasticSettings(to=0.889, waiting=(4, 32), fall_seconds=5.0)
RATIOS = (0.0, 0.222, 0.445, 0.667, 0.889)


def test_there_are_few_ratios() -> None:
    assert ratios_of(0.0, 0.889) == RATIOS
    assert ratios_of(0.667, 0.889) == (0.667, 0.723, 0.778, 0.834, 0.889)


@given(st.floats(0, 0.94), st.floats(0, 0.94))
def test_ratios_ascend(one: float, other: float) -> None:
    default, to = sorted((one, other))
    ratios = ratios_of(default, to)
    assert (ratios[0], ratios[-1], len(ratios)) == (default, to, LEVELS + 1)
    assert list(ratios) == sorted(ratios)


@pytest.mark.parametrize(
    ("waiting", "ratio"),
    [
        *[(0, 0.0), (4, 0.0), (5, 0.222), (13, 0.222), (14, 0.445), (22, 0.445)],
        *[(23, 0.667), (31, 0.667), (32, 0.889), (1000, 0.889)],
    ],
)
def test_the_ratio_rises_at_once(waiting: int, ratio: float) -> None:
    assert ElasticRatio(0.0, SETTINGS).update(waiting, 100.0) == ratio


def test_two_numbers_may_be_neighbours() -> None:
    elastic = ElasticRatio(0.5, ElasticSettings(to=0.889, waiting=(0, 1)))
    assert [elastic.update(waiting, 0.0) for waiting in (0, 1)] == [0.5, 0.889]


def test_the_ratio_falls_one_level_at_a_time() -> None:
    elastic = ElasticRatio(0.0, SETTINGS)
    elastic.update(32, 100.0)
    times = (100.0, 104.9, 105.0, 109.9, 110.0, 115.0, 119.9, 120.0, 200.0)
    ratios = [0.889, 0.889, 0.667, 0.667, 0.445, 0.222, 0.222, 0.0, 0.0]
    assert [elastic.update(0, now) for now in times] == ratios


def test_an_idle_time_counts_when_nobody_asks() -> None:
    elastic = ElasticRatio(0.0, SETTINGS)
    elastic.update(32, 100.0)
    assert elastic.update(0, 110.0) == 0.445
    assert elastic.update(0, 1e6) == 0.0


def test_load_of_the_level_restarts_the_wait() -> None:
    elastic = ElasticRatio(0.0, SETTINGS)
    elastic.update(32, 100.0)
    assert elastic.update(22, 104.0) == 0.889
    assert elastic.update(32, 104.5) == 0.889
    assert elastic.update(22, 109.0) == 0.889
    # It falls to what the load asks for, and stays there.
    assert [elastic.update(22, now) for now in (109.5, 114.5, 200.0)] == [0.667, 0.445, 0.445]
    assert elastic.update(0, 204.9) == 0.445
    assert elastic.update(0, 205.0) == 0.222
    assert elastic.update(23, 205.1) == 0.667


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 30)), max_size=50))
def test_the_ratio_is_never_below_what_load_asks_for(events: list[tuple[int, float]]) -> None:
    elastic, now = ElasticRatio(0.0, SETTINGS), 0.0
    for waiting, seconds in events:
        before, now = elastic.level, now + seconds
        ratio = elastic.update(waiting, now)
        assert ratio in RATIOS
        assert ratio >= ElasticRatio(0.0, SETTINGS).update(waiting, now)
        assert elastic.level >= before - int(seconds / SETTINGS.fall_seconds) - 1


class Engine:
    """An engine client with a number of unfinished requests."""

    unfinished = 0

    def get_num_unfinished_requests(self) -> int:
        return self.unfinished


def running(number: int) -> Any:
    return SimpleNamespace(num_running_reqs=number)


def test_requests_wait_until_an_engine_runs_them() -> None:
    async def check() -> None:
        engine = Engine()
        default = ElasticDefault(PruningSettings(), SETTINGS, engine)
        engine.unfinished = 6
        default.record(running(1), None, engine_idx=0)
        default.record(running(2), None, engine_idx=1)
        assert default.num_waiting == 3
        with default.rendering(), default.rendering():
            assert default.num_waiting == 5
            assert default.least() == 0.222
        assert default.num_waiting == 3
        default.record(None, None, engine_idx=1)
        assert default.num_waiting == 3
        engine.unfinished = 1  # the others were aborted, and there was no step since
        assert default.num_waiting == 0

    asyncio.run(check())


def test_a_request_that_is_not_rendered_does_not_wait() -> None:
    default = ElasticDefault(PruningSettings(), SETTINGS, Engine())
    with pytest.raises(ValueError, match="bad image"), default.rendering():
        raise ValueError("bad image")
    assert default.num_waiting == 0


def test_the_gauge_falls_on_an_idle_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks for the ratio: a timer lowers it, level by level."""

    async def check() -> list[float]:
        clock = [0.0]
        monkeypatch.setattr(default_ratio, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        loop = asyncio.get_running_loop()
        timers: list[tuple[float, Callable[[], None]]] = []

        def call_later(after: float, call: Callable[[], None]) -> object:
            timers.append((after, call))
            return call

        monkeypatch.setattr(loop, "call_later", call_later)
        engine = Engine()
        default = ElasticDefault(PruningSettings(), SETTINGS, engine)
        engine.unfinished = 32
        default.record(running(0), None)
        engine.unfinished = 0
        default.record(running(0), None)
        shown = [DEFAULT_RATIO._value.get()]
        while timers:
            assert len(timers) == 1
            after, call = timers.pop()
            clock[0] += after
            call()
            shown.append(DEFAULT_RATIO._value.get())
        return shown

    assert asyncio.run(check()) == list(reversed(RATIOS))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"to": 0.889, "waiting": [4]}, "waiting"),
        ({"to": 0.889, "waiting": [4, 4]}, r"ascending numbers; got \[4, 4\]"),
        ({"to": 0.889, "waiting": [-1, 4]}, "greater than or equal to 0"),
        ({"to": 0.0, "waiting": [4, 32]}, "greater than 0"),
        ({"to": 1.0, "waiting": [4, 32]}, "less than 1"),
        ({"to": 0.889, "waiting": [4, 32], "fall_seconds": 0}, "greater than 0"),
        ({"too": 0.889, "waiting": [4, 32]}, "Did you mean 'to'"),
        ({"waiting": [4, 32]}, "to"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ElasticSettings.model_validate(fields)


ARGS = {
    "max_num_queued_reqs": None,
    "enable_elastic_ep": False,
    "disable_log_stats": False,
}


@pytest.mark.parametrize(
    ("pruning", "args", "api_servers", "message"),
    [
        ({"default_ratio": 0.889}, {}, 1, r"to 0\.889 must be above the default ratio 0\.889"),
        (
            {"default_ratio": "auto", "auto": {"min": 0.9}},
            {},
            1,
            r"to 0\.889 must be above the default ratio 0\.9",
        ),
        ({"max_pruning_ratio": 0.8}, {}, 1, r"not above pruning\.max_pruning_ratio 0\.8"),
        ({}, {}, 2, "would be 2,.*set --api-server-count 1"),
        ({}, {"enable_elastic_ep": True}, 1, "leave out --enable-elastic-ep"),
        ({}, {"disable_log_stats": True}, 1, "leave out --disable-log-stats"),
        ({}, {"max_num_queued_reqs": 32}, 1, "before 32 wait: raise it, or lower"),
    ],
)
def test_what_cannot_be_done_right_is_refused(
    pruning: dict[str, Any], args: dict[str, Any], api_servers: int, message: str
) -> None:
    good: Any = SimpleNamespace(**ARGS | {"max_num_queued_reqs": 33})
    check_elastic(SETTINGS, PruningSettings(), good, 1)
    bad: Any = SimpleNamespace(**ARGS | args)
    with pytest.raises(ValueError, match=message):
        check_elastic(SETTINGS, PruningSettings(**pruning), bad, api_servers)


@pytest.mark.parametrize(("limit", "fits"), [(14_748, True), (14_747, False)])
def test_a_step_must_hold_the_largest_image(limit: int, fits: bool) -> None:
    preview = grid_preview()
    preview.info.span_limit = limit
    loggers: list[Any] = []
    engine: Any = SimpleNamespace(logger_manager=SimpleNamespace(stat_loggers=loggers))
    args: Any = SimpleNamespace(**ARGS, api_server_count=None)
    if fits:
        default = default_ratio_of(engine, preview, SETTINGS, args)
        assert loggers == [default]
    else:
        tokens = preview.counts(3584, 3584, FixedRatio(0.222)).stages[0]
        with pytest.raises(ValueError, match=f"--max-num-batched-tokens {tokens} or more"):
            default_ratio_of(engine, preview, SETTINGS, args)
    assert default_ratio_of(engine, preview, None, args).least() == 0.0
