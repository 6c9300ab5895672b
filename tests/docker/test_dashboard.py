"""The dashboard queries metrics that a running server exports."""

import json
import re
from typing import Any

import httpx
import pytest
import yaml

from tests.docker.files import DOCKER
from tests.server.sample_images import image_message

DASHBOARD = json.loads((DOCKER / "grafana/dashboards/vitcop.json").read_text())
PANELS: list[dict[str, Any]] = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
NAMES = sorted(
    {
        name
        for panel in PANELS
        for target in panel["targets"]
        for name in re.findall(r"\b(?:vllm:|vitcop_)\w+", target["expr"])
    }
)


def test_dashboard_shows_every_metric_of_the_plugin() -> None:
    shown = {re.sub("_(total|bucket)$", "", name) for name in NAMES if name.startswith("vitcop_")}
    assert shown == {
        "vitcop_requests",
        "vitcop_requests_raised",
        "vitcop_default_ratio",
        "vitcop_images",
        "vitcop_visual_tokens_kept",
        "vitcop_visual_tokens_dropped",
        "vitcop_kv_blocks_not_taken",
        "vitcop_ratio_errors",
        "vitcop_selection_seconds",
    }


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_dashboard_uses_the_provisioned_data_source() -> None:
    source = DOCKER / "grafana/provisioning/datasources/prometheus.yml"
    (prometheus,) = yaml.safe_load(source.read_text())["datasources"]
    assert prometheus["type"] == "prometheus"
    assert prometheus["url"] == "http://prometheus:9090"
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"


@pytest.mark.slow
def test_every_metric_is_exported(server_url: str) -> None:
    # Some counters appear with their first event.
    model = httpx.get(f"{server_url}/v1/models").json()["data"][0]["id"]
    body = {"model": model, "max_tokens": 2, "messages": [image_message(1)]}
    for ratio, status in (("0.889", 200), ("much", 400)):
        answer = httpx.post(
            f"{server_url}/v1/chat/completions",
            json=body,
            headers={"X-Pruning-Ratio": ratio},
            timeout=60,
        )
        assert answer.status_code == status
    samples = httpx.get(f"{server_url}/metrics").text.splitlines()
    exported = {re.split(r"[{ ]", line)[0] for line in samples if not line.startswith("#")}
    assert [name for name in NAMES if name not in exported] == []
