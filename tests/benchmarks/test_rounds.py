"""The order of turns, and which runs are profiled."""

from functools import partial
from typing import Any

import pytest

from benchmarks.engines import OURS, STOCK
from benchmarks.rounds import Rounds, Turns, summary
from tests.benchmarks.fake_engines import FakeEngine
from vitcop_vllm.demo.checkpoint import DEMO


def make_rounds(number: int = 1, **options: Any) -> tuple[Rounds, dict[Any, Any]]:
    engines: dict[Any, Any] = {name: FakeEngine(name, DEMO) for name in (STOCK, OURS)}
    return Rounds(engines, DEMO, number, **options), engines


def test_summary_has_medians_and_spreads():
    rounds = [{"a": 3.0, "b": 4.0}, {"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 5.0}]
    assert summary(rounds, "a", "c") == {"a": 2.0, "b": 4.0, "a_spread": [1.0, 3.0]}


def test_another_engine_goes_first_each_time():
    turns = Turns()
    order: list[str] = []

    def run(name: str) -> dict[str, Any]:
        order.append(name)
        return {"by": name}

    for _ in range(4):
        results = turns.run({name: partial(run, name) for name in "abc"})
        assert list(results) == ["a", "b", "c"]
        assert all(result["by"] == name for name, result in results.items())
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"


def test_all_engines_get_the_same_requests_about_new_images():
    rounds, engines = make_rounds()
    rounds = rounds.showing(2)
    seen = []
    for _ in range(2):
        rounds.serve(rounds.new_requests(3, 0.5, 4))
        assert engines[STOCK].commands == engines[OURS].commands
        seen += [
            seed for request in engines[OURS].commands[-1]["requests"] for seed in request.images
        ]
    assert len(set(seen)) == len(seen) == 12


@pytest.mark.parametrize("apart", [False, True])
def test_profiling_apart_makes_a_second_run(apart):
    rounds, engines = make_rounds(profile_apart=apart)
    timed, profiled = rounds.serve_profiled(lambda: rounds.new_requests(1, 0.5, 1))
    for engine in engines.values():
        assert [run["profile"] for run in engine.commands] == ([False, True] if apart else [True])
    assert "encoder_seconds" in profiled[STOCK]
    assert ("encoder_seconds" in timed[STOCK]) is not apart
    images = [request.images for run in engines[OURS].commands for request in run["requests"]]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("apart", [False, True])
def test_profiling_apart_does_not_count_as_a_turn(apart):
    rounds, engines = make_rounds(profile_apart=apart)
    first = []
    for name, engine in engines.items():

        def run(what, *, _name=name, _run=engine.run, **command):
            if not (apart and command["profile"]):
                first.append(_name)
            return _run(what, **command)

        engine.run = run
    for _ in range(3):
        rounds.serve_profiled(lambda: rounds.new_requests(1, 0.5, 1))
    assert first == [STOCK, OURS, OURS, STOCK, STOCK, OURS]
