"""SIGTERM while an answer streams: it goes on to its end, and nobody else is let in."""

import time
from pathlib import Path

import httpx
import pytest

from tests.server.process import LITTLE_MEMORY, engine_of, running_server


@pytest.mark.slow
def test_a_signal_cuts_off_no_answer() -> None:
    with running_server("--config", "configs/demo-cpu.yaml", *LITTLE_MEMORY) as (url, server):
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
        engine = engine_of(server)
        log = Path("/proc", str(server.pid), "fd", "1").open()  # noqa: SIM115 - it outlives PID
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": "Count."}],
            "max_tokens": 300,
            "ignore_eos": True,
            "stream": True,
        }
        route = f"{url}/v1/chat/completions"
        with httpx.stream("POST", route, json=body, timeout=120) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            engine.suspend()  # until all has been looked at
            server.terminate()
            until = time.monotonic() + 10
            while (ready := httpx.get(f"{url}/ready")).status_code == 200:
                assert time.monotonic() < until
                time.sleep(0.05)
            refused = httpx.post(route, json=body)
            overloaded = httpx.post(f"{url}/v1/messages", json=body)
            head = httpx.head(f"{url}/ready")
            alive = httpx.get(f"{url}/health")
            engine.resume()
            *_, last = (line for line in lines if line)
        assert last == "data: [DONE]"
        for turned_away in (ready, refused):
            assert turned_away.status_code == 503
            assert int(turned_away.headers["Retry-After"]) > 0
            assert turned_away.json()["error"]["type"] == "ServiceUnavailableError"
        assert overloaded.status_code == head.status_code == 503
        assert overloaded.json()["type"] == "error"
        assert overloaded.json()["error"]["type"] == "overloaded_error"
        assert alive.status_code == 200
        assert server.wait(timeout=60) == 0
        with log:
            said = log.read()
        assert "Application shutdown complete." in said
        assert "ERROR" not in said
        assert "Traceback" not in said
