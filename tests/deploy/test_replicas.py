"""Two replicas behind the proxy, without a GPU, with Prometheus: who loses an answer, and when."""

import json
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, cast

import httpx
import pytest
from openai import OpenAI

from tests.deploy.deployment import CPU_REPLICAS, KEY, Deployment, deployed, wait_until
from tests.deploy.traffic import Record, traffic
from tests.docker.test_dashboard import PANELS
from tests.server.sample_images import image_message

SETTLE_S = 8.0
"""Seconds of traffic before and after each event; the proxy asks for addresses every 5 s."""

REPLICAS = ("replica-0", "replica-1")


@pytest.fixture(scope="module")
def deployment(images: dict[str, float]) -> Iterator[Deployment]:
    # By name: Grafana is not started, because Debian has no package of it.
    services = (*REPLICAS, "balancer", "prometheus")
    with deployed(
        "replicas", "observability", files=(CPU_REPLICAS,), services=services
    ) as deployment:
        yield deployment


def kill(deployment: Deployment) -> None:
    """Kill all processes of a replica at once, as a machine that fails would."""
    code = "import os; os.kill(-1, 9)"
    report("replica-0", deployment, lambda: deployment.python("replica-0", code, check=False))


def kill_engine(deployment: Deployment) -> None:
    report("replica-1", deployment, lambda: deployment.kill("replica-1", "VLLM::EngineCor"))


def report(name: str, deployment: Deployment, kill: Callable[[], object]) -> None:
    times = deployment.come_back(name, kill)
    print("\n{}: container started after {:.0f} s, healthy {:.0f} s later".format(name, *times))


def roll(deployment: Deployment) -> None:
    """The rolling update of docs/deploy.md."""
    for name in REPLICAS:
        deployment.up("--no-deps", "--force-recreate", name)


def drain(deployment: Deployment) -> None:
    deployment.compose("stop", "replica-0")
    time.sleep(SETTLE_S)
    deployment.up("--no-deps", "replica-0")


def test_nobody_else_loses_an_answer(deployment: Deployment, rounds: int) -> None:
    """Only streams that had begun on a killed replica are lost."""
    table = []
    for number in range(rounds):
        for event in (kill, kill_engine, roll, drain):
            begin = time.monotonic()
            with traffic(deployment.url, seed=number) as record:
                time.sleep(SETTLE_S)
                at = time.monotonic()
                event(deployment)
                time.sleep(SETTLE_S)
            table.append((number, event.__name__, record))
            print(
                f"\nround {number}, {event.__name__}: {time.monotonic() - begin:.0f} s, "
                f"{record.answered} answered ({record.streamed} streamed), lost: "
                f"{[(round(lost.at - at, 1), lost.began, lost.reason) for lost in record.lost]}",
                flush=True,
            )
    assert all(record.answered for _, _, record in table)
    assert [row for row in table if not_allowed(*row[1:])] == []


def not_allowed(event: str, record: Record) -> bool:
    return any(not (lost.began and event.startswith("kill")) for lost in record.lost)


def test_a_session_stays_with_one_replica(deployment: Deployment) -> None:
    """Prefix cache hits tell which replica answered before."""
    for session in range(12):
        client = OpenAI(
            base_url=f"{deployment.url}/v1",
            api_key=KEY,
            default_headers={"X-Session-ID": f"session {session}"},
        )
        texts = ("What colour is it?", "And what shape?")
        hits = []
        for text in texts:
            answer = client.chat.completions.create(
                model="demo",
                messages=[cast(Any, image_message(1000 + session, text=text))],
                max_tokens=1,
            )
            details = answer.usage and answer.usage.prompt_tokens_details
            hits.append(bool(details and details.cached_tokens))
        assert hits == [False, True]


def prometheus(deployment: Deployment, path: str, **query: str) -> list[dict[str, object]]:
    """Results of Prometheus' HTTP API, which publishes no port."""
    address = f"http://127.0.0.1:9090/api/v1/{path}?{urllib.parse.urlencode(query)}"
    answer = json.loads(deployment.compose("exec", "-T", "prometheus", "wget", "-qO-", address))
    data = answer["data"]
    found: list[dict[str, object]] = data.get("result", data.get("activeTargets"))
    return found


def test_prometheus_sees_both_replicas(deployment: Deployment) -> None:
    def healthy() -> bool:
        targets = prometheus(deployment, "targets")
        return [target["health"] for target in targets] == ["up", "up"]

    wait_until(healthy, "two targets", 60)


def test_every_query_of_the_dashboard_has_data(deployment: Deployment) -> None:
    """After traffic with images, a wrong ratio, and two scrapes."""
    with traffic(deployment.url, seed=99):
        for session in range(12):  # each replica counts its own errors
            headers = {
                "Authorization": f"Bearer {KEY}",
                "X-Pruning-Ratio": "much",
                "X-Session-ID": str(session),
            }
            body = {"model": "demo", "messages": [image_message(1)]}
            answer = httpx.post(
                f"{deployment.url}/v1/chat/completions", json=body, headers=headers, timeout=60
            )
            assert answer.status_code == 400
        time.sleep(50)
    empty = {
        target["expr"]
        for panel in PANELS
        for target in panel["targets"]
        if not prometheus(
            deployment,
            "query",
            query=target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*"),
        )
    }
    assert empty == set()


def test_an_orderly_stop_logs_no_traceback(deployment: Deployment) -> None:
    since = {name: deployment.state(name)["StartedAt"] for name in REPLICAS}
    deployment.compose("stop")
    for name, begin in since.items():
        assert deployment.state(name)["ExitCode"] == 0
        log = deployment.log(name, begin)
        assert "Traceback" not in log, log[-4000:]
