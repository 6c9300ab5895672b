"""SIGTERM while an answer streams: the answer completes, and new requests are refused."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.process import LITTLE_MEMORY, engine_of, running_server
from vitcop_vllm.plugin import installed_vllm_version

LATE: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"stream": False}),
    ("/v1/chat/completions", {"stream": True}),
    ("/v1/completions", {"stream": True, "prompt": "Count."}),
    ("/v1/responses", {"stream": False, "input": "Count."}),
    ("/v1/messages", {"stream": True}),
]
"""Paths and fields of requests that reach the engine when it stops: it gives them no token."""


def without_stream_error(log: str) -> str:
    """A log without the error that vLLM 0.33 logs for a stream of ``/v1/messages`` that gets it."""
    if not installed_vllm_version().startswith("0.33."):
        return log
    record = re.search(r"(\[serving\.py:\d+\]) Error in message stream converter", log)
    assert record is not None, "vLLM does not log it any more: remove this function"
    return "".join(line for line in log.splitlines(True) if record[1] not in line)


@pytest.mark.slow
def test_sigterm_lets_a_running_answer_complete() -> None:
    config = ("--config", "configs/demo-cpu.yaml")
    with running_server(*config, *LITTLE_MEMORY, forks=False) as (url, server):
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
        with (
            ThreadPoolExecutor(len(LATE)) as clients,
            httpx.stream("POST", route, json=body, timeout=120) as answer,
        ):
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            engine.suspend()  # so that the answer does not end before the checks
            late = [
                clients.submit(httpx.post, f"{url}{path}", json={**body, **fields}, timeout=120)
                for path, fields in LATE
            ]
            time.sleep(3)  # the server sends them to the engine, which will be stopping
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
        for answer_503 in (ready, refused, *(job.result() for job in late[:-1])):
            assert answer_503.status_code == 503
            assert int(answer_503.headers["Retry-After"]) > 0
            assert answer_503.json()["error"]["type"] == "ServiceUnavailableError"
        assert head.status_code == 503
        for anthropic_503 in (overloaded, late[-1].result()):
            assert anthropic_503.status_code == 503
            assert anthropic_503.json()["type"] == "error"
            assert anthropic_503.json()["error"]["type"] == "overloaded_error"
        assert alive.status_code == 200
        assert server.wait(timeout=60) == 0
        with log:
            text = without_stream_error(log.read())
        assert "Application shutdown complete." in text
        assert "ERROR" not in text
        assert "Traceback" not in text
