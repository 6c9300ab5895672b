"""The server's own tests, run with what the CPU image contains."""

from tests.deploy.deployment import docker
from tests.docker.files import ROOT

TEST_IMAGE = """
FROM vitcop-vllm:cpu
USER root
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/uv/bin:$PATH
RUN apt-get update && apt-get install --yes --no-install-recommends chromium libatomic1 make
COPY requirements requirements
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --require-hashes -r requirements/uv.txt \\
 && uv pip install --require-hashes --no-deps --no-cache -r requirements/dev.txt \\
 && uv pip uninstall triton vitcop-vllm
"""
"""The image with the tools of the tests. Triton, a tool of other tests, is missing as in the image;
the package is the mounted one."""


def test_the_tests_of_the_server_pass_in_the_image(images: dict[str, float]) -> None:
    name = "vitcop-vllm:cpu-test"
    file = ROOT / "build" / "Dockerfile.test"
    file.parent.mkdir(exist_ok=True)
    file.write_text(TEST_IMAGE)
    docker("build", "--quiet", "--tag", name, "--file", str(file), str(ROOT))
    # A copy, because tests of the page and of the launcher write beside their files.
    run = (
        "cp -r /source /tmp/source && cd /tmp/source && "
        "uv pip install --quiet --no-deps --no-build-isolation --editable . && "
        "/opt/venv/bin/python -m pytest tests/server tests/docker/test_dashboard.py -n 2"
    )
    options = ("--rm", "--shm-size=2g", "--env", "HF_HUB_OFFLINE=1", "--cap-add", "SYS_NICE")
    mounted = [
        f"--volume={ROOT / folder}:/source/{folder}:ro"
        for folder in (
            *("vitcop_vllm", "server", "tests", "benchmarks", "evaluation", "demo", "configs"),
            *("docker", "docs", "tools", "pyproject.toml", "README.md", "LICENSE", "Makefile"),
        )
    ]
    output = docker("run", *options, *mounted, "--entrypoint", "sh", name, "-c", run, timeout=3600)
    print(output[-400:])
    assert " passed" in output
