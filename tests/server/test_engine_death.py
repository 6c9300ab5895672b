"""A server whose engine is killed."""

import psutil  # type: ignore[import-untyped]
import pytest

from tests.server.process import running_server


@pytest.mark.slow
def test_process_exits_with_an_error() -> None:
    with running_server("--config", "configs/demo-cpu.yaml") as (_, server):
        children = psutil.Process(server.pid).children()
        (engine,) = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
        engine.kill()
        assert server.wait(timeout=60) == 1
