"""The process's exit status after the engine died."""

from dataclasses import dataclass, field

import pytest

from vitcop_server.exit_status import exit_nonzero_when_dead


@dataclass
class Engine:
    errored: bool = False
    timeouts: list[float | None] = field(default_factory=list)

    def shutdown(self, timeout: float | None = None) -> None:
        self.timeouts.append(timeout)
        self.errored = True  # As in vLLM: a stopped engine counts as dead.


def test_shutdown_of_a_live_engine_returns() -> None:
    engine = Engine()
    exit_nonzero_when_dead(engine)
    engine.shutdown(timeout=3)
    engine.shutdown(timeout=None)
    assert engine.timeouts == [3, None]


def test_shutdown_of_a_dead_engine_exits() -> None:
    engine = Engine(errored=True)
    exit_nonzero_when_dead(engine)
    with pytest.raises(SystemExit) as exit_:
        engine.shutdown()
    assert exit_.value.code == 1
    assert engine.timeouts == [None]
