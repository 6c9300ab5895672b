"""The values for the production-stack chart, as far as they can be checked without the chart."""

import re
from typing import Any

import yaml

from tests.docker.files import DOCKER
from vitcop_server.arguments import make_parser
from vitcop_server.settings import server_settings
from vitcop_vllm.pruning.settings import CONFIG_KEY, PruningSettings

VALUES: dict[str, Any] = yaml.safe_load((DOCKER / "production-stack-values.yaml").read_text())
KUBERNETES_GRACE_SECONDS = 30  # the default; the chart has no value for it


def arguments() -> Any:
    (model,) = VALUES["servingEngineSpec"]["modelSpec"]
    return make_parser().parse_args([model["modelURL"], *model["vllmConfig"]["extraArgs"]])


def test_the_server_accepts_the_flags() -> None:
    args = arguments()
    assert not args.trust_request_mm_kwargs  # clients cannot set image processing
    settings = PruningSettings.model_validate(args.additional_config[CONFIG_KEY])
    assert (settings.shallow_boundary, settings.deep_boundary) == (2, 22)
    server_settings(args)


def test_pods_stop_within_the_grace_period() -> None:
    assert arguments().shutdown_timeout + 15 <= KUBERNETES_GRACE_SECONDS


def test_vllm_loads_the_plugin() -> None:
    (model,) = VALUES["servingEngineSpec"]["modelSpec"]
    assert {"name": "VLLM_PLUGINS", "value": "vitcop"} in model["env"]


def test_the_image_has_the_metrics_directory() -> None:
    (model,) = VALUES["servingEngineSpec"]["modelSpec"]
    (folder,) = (e["value"] for e in model["env"] if e["name"] == "PROMETHEUS_MULTIPROC_DIR")
    [owned] = re.findall(
        r"install --directory --owner vitcop [^&]*?((?:/[\w/]+\s*)+)",
        (DOCKER / "Dockerfile").read_text().replace("\\\n", " "),
    )
    assert folder in owned.split()


def test_sessions_use_the_header_of_the_proxy() -> None:
    assert VALUES["routerSpec"]["routingLogic"] == "session"
    assert "$http_x_session_id" in (DOCKER / "nginx/nginx.conf").read_text()
    assert VALUES["routerSpec"]["sessionKey"] == "x-session-id"
