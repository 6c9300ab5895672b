"""The compose file is consistent and has the properties that docs/deploy.md states."""

import re
import shutil
import subprocess
from typing import Any

import pytest

from tests.docker.files import DOCKER, ROOT, compose, seconds
from vitcop_server.arguments import make_parser

SERVICES: dict[str, Any] = compose()["services"]
SERVERS = ("cpu", "gpu", "replica-0", "replica-1")
PROXIES = ("proxy", "balancer")

each_service = pytest.mark.parametrize("name", SERVICES)


def test_every_service_has_its_profiles() -> None:
    profiles = {name: service["profiles"] for name, service in SERVICES.items()}
    assert profiles == {
        "cpu": ["cpu"],
        "gpu": ["gpu"],
        "replica-0": ["replicas"],
        "replica-1": ["replicas"],
        "proxy": ["cpu", "gpu"],
        "balancer": ["replicas"],
        "prometheus": ["observability"],
        "grafana": ["observability"],
    }


@each_service
def test_image_is_built_from_this_repository_or_pinned(name: str) -> None:
    service = SERVICES[name]
    if "build" not in service:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-\w+)?", service["image"])


@each_service
def test_service_restarts_and_runs_under_an_init(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["init"] is True


@each_service
def test_stop_grace_period_is_longer_than_the_drain(name: str) -> None:
    drain: int = make_parser().get_default("shutdown_timeout")
    assert seconds(SERVICES[name]["stop_grace_period"]) >= drain + 15


@each_service
def test_service_has_a_health_check(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD"  # No shell: some images have none.
    assert seconds(check["timeout"]) <= seconds(check["interval"])
    assert seconds(check["start_period"]) >= (300 if name in SERVERS else 10)


@each_service
def test_service_has_few_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert "privileged" not in service
    assert str(service.get("user", "10001")).split(":")[0] not in ("0", "root")


@each_service
def test_files_and_names_exist(name: str) -> None:
    service, document = SERVICES[name], compose()
    if build := service.get("build"):
        assert (DOCKER / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
    for volume in service["volumes"]:
        source = volume.split(":")[0]
        assert source in document["volumes"] or (DOCKER / source).exists()
    assert set(service["networks"]) <= set(document["networks"])


@pytest.mark.parametrize("name", SERVERS)
def test_default_configuration_exists(name: str) -> None:
    _, config, *_ = SERVICES[name]["command"].split()
    assert (ROOT / config).is_file()


def test_configuration_and_flags_can_be_chosen() -> None:
    chosen = compose({"CONFIG": "demo-gpu", "ARGS": "--tensor-parallel-size 2"})["services"]["gpu"]
    assert chosen["command"].split() == [
        *("--config", "configs/demo-gpu.yaml", "--host", "0.0.0.0"),
        *("--tensor-parallel-size", "2"),
    ]
    assert (ROOT / "configs/demo-gpu.yaml").is_file()


def test_only_proxies_and_grafana_publish_ports_on_loopback() -> None:
    published = {n: service["ports"] for n, service in SERVICES.items() if "ports" in service}
    assert published == {
        "proxy": ["127.0.0.1:8000:8080"],
        "balancer": ["127.0.0.1:8000:8080"],
        "grafana": ["127.0.0.1:3000:3000"],
    }


def test_cpu_server_has_no_internet_access() -> None:
    assert list(SERVICES["cpu"]["networks"]) == ["inside"]
    assert compose()["networks"]["inside"]["internal"] is True


@pytest.mark.parametrize("name", SERVERS)
def test_server_reads_the_api_key_from_the_environment(name: str) -> None:
    environment = SERVICES[name]["environment"]
    assert "VLLM_API_KEY" in environment
    assert environment["VLLM_API_KEY"] is None


@pytest.mark.parametrize("name", SERVERS)
def test_metrics_directory_is_empty_at_start(name: str) -> None:
    folder = SERVICES[name]["environment"]["PROMETHEUS_MULTIPROC_DIR"]
    assert any(mount.split(":")[0] == folder for mount in SERVICES[name]["tmpfs"])


@pytest.mark.parametrize("name", [name for name in SERVERS if name != "cpu"])
def test_gpu_server_has_a_gpu_and_shared_memory(name: str) -> None:
    (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert SERVICES[name]["ipc"] == "host"


def test_replicas_use_different_gpus() -> None:
    used = [
        SERVICES[name]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for name in SERVERS
        if name.startswith("replica")
    ]
    assert used == [["0"], ["1"]]


def upstreams(file: str) -> list[str]:
    return re.findall(
        r"^\s*server ([\w-]+):8000 resolve", (DOCKER / "nginx" / file).read_text(), re.M
    )


def test_balancer_lists_every_replica() -> None:
    replicas = [name for name in SERVICES if name.startswith("replica")]
    assert upstreams("replicas.conf") == replicas


def test_every_server_has_the_network_alias_server() -> None:
    assert upstreams("one.conf") == ["server"]
    for name in SERVERS:
        assert SERVICES[name]["networks"]["inside"]["aliases"] == ["server"]


@pytest.mark.parametrize("profile", ["cpu", "gpu", "replicas"])
def test_docker_compose_accepts_the_file(profile: str) -> None:
    command = ["docker", "compose", "-f", str(DOCKER / "docker-compose.yml")]
    found = shutil.which("docker") and subprocess.run(
        ["docker", "compose", "version"], capture_output=True, check=False
    )
    if not found or found.returncode:
        pytest.skip("docker compose is not installed")
    subprocess.run(
        [*command, "--profile", profile, "--profile", "observability", "config", "--quiet"],
        check=True,
        timeout=60,
    )
