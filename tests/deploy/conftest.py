"""The images, built once. Needs a Docker engine: skipped without ``--deploy``."""

import pytest

from tests.deploy.deployment import Deployment, docker


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "images" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
            if config.getoption("--deploy") is None:
                item.add_marker(pytest.mark.skip(reason="`make deploy-check` runs it"))


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    chosen: int = request.config.getoption("--deploy")
    return chosen


@pytest.fixture(scope="session")
def images() -> dict[str, float]:
    """Name of each image -> its size in GB."""
    Deployment(("cpu", "gpu")).compose("build", "--quiet")
    return {
        name: int(docker("image", "inspect", "--format", "{{.Size}}", name)) / 1e9
        for name in ("vitcop-vllm:cpu", "vitcop-vllm:gpu")
    }
