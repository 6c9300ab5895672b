"""The Dockerfiles copy existing files, pin their images and do not run as root."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.docker.files import DOCKER, ROOT
from vitcop_vllm.plugin import is_supported

FILES = ("Dockerfile", "Dockerfile.cpu")
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

each_file = pytest.mark.parametrize("file", FILES)


def instructions(file: str) -> list[tuple[str, str]]:
    """Each instruction and its arguments on one line."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / file).read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line.strip()]


def arguments(file: str, instruction: str) -> list[str]:
    return [rest for name, rest in instructions(file) if name == instruction]


@each_file
def test_images_are_pinned(file: str) -> None:
    for image in arguments(file, "FROM"):
        assert re.match(r"[\w./-]+:v?\d+\.\d+\.\d+\S*( AS \w+)?$", image), image


def test_the_gpu_image_has_the_vllm_of_the_gpu_requirements() -> None:
    (version,) = re.findall(r"^vllm==(\S+)", (ROOT / "requirements/gpu.txt").read_text(), re.M)
    assert arguments("Dockerfile", "FROM")[-1] == f"vllm/vllm-openai:v{version}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = extras["optional-dependencies"]["gpu"]
    assert Requirement(wanted).specifier.contains(version)
    assert is_supported(version)


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_an_extra_installs_no_vllm_that_the_plugin_refuses(extra: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = Requirement(extras["optional-dependencies"][extra][0]).specifier
    versions = [f"0.{minor}.{patch}" for minor in range(60) for patch in (0, 3)]
    installed = [version for version in versions if allowed.contains(version)]
    assert installed
    assert all(map(is_supported, installed))


@each_file
def test_image_does_not_run_as_root(file: str) -> None:
    last_stage = instructions(file)[-8:]
    assert ("USER", "10001:10001") in last_stage


@each_file
def test_entrypoint_runs_the_server_without_a_shell(file: str) -> None:
    (entrypoint,) = arguments(file, "ENTRYPOINT")
    (command,) = arguments(file, "CMD")
    assert json.loads(entrypoint) == ["vitcop-serve"]
    flag, config, *host = json.loads(command)
    assert (flag, host) == ("--config", ["--host", "0.0.0.0"])
    assert (ROOT / config).is_file()


@each_file
def test_health_check_runs_healthcheck_py(file: str) -> None:
    (check,) = arguments(file, "HEALTHCHECK")
    assert json.loads(check.partition("CMD ")[2])[1:] == ["healthcheck.py"]
    assert "docker/healthcheck.py ./" in arguments(file, "COPY")


@each_file
def test_copied_files_exist_and_are_not_ignored(file: str) -> None:
    ignored, *rest = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert ignored == "*"
    allowed = {line[1:] for line in rest if line.startswith("!")}
    for copy in arguments(file, "COPY"):
        if copy.startswith("--from"):
            continue
        for source in copy.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source in allowed or source.split("/")[0] in allowed, source


def test_install_commands_equal_the_makefile_s() -> None:
    makefile = (ROOT / "Makefile").read_text()
    installed = " ".join(arguments("Dockerfile.cpu", "RUN"))
    for command in (
        "pip sync --python {} --require-hashes --no-build ",
        "--no-deps --no-build-isolation ",
    ):
        assert command.format("$(BIN)/python") in makefile
        assert command.format("/opt/venv/bin/python") in re.sub(r"\s+", " ", installed)


@each_file
@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_accepts_the_file(file: str) -> None:
    subprocess.run([str(HADOLINT), str(DOCKER / file)], check=True, timeout=60)
