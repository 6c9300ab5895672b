"""The wheel holds the plugin and the server with the demo model, and no other package."""

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*build, "--directory", str(folder)], cwd=ROOT, check=True)
    (path,) = folder.glob("*.whl")
    return ZipFile(path)


def test_two_packages_are_installed(wheel: ZipFile) -> None:
    folders = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in folders if not name.endswith(".dist-info")} == {
        "vitcop_vllm",
        "vitcop_server",
    }


def test_the_packages_keep_every_file(wheel: ZipFile) -> None:
    files = {
        str(path.relative_to(parent))
        for parent, package in ((ROOT, "vitcop_vllm"), (ROOT / "server", "vitcop_server"))
        for path in (parent / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= set(wheel.namelist())
    assert {"vitcop_vllm/demo/model/model.safetensors", "vitcop_server/page.html"} <= files


def test_entry_points_name_the_command_and_the_plugins(wheel: ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    found = ConfigParser()
    found.read_string(wheel.read(path).decode())
    assert {group: dict(found[group]) for group in found.sections()} == {
        "console_scripts": {
            "vitcop-bench": "vitcop_server.bench:main",
            "vitcop-calibrate": "vitcop_server.calibrate.command:main",
            "vitcop-serve": "vitcop_server.launcher:main",
        },
        "vllm.general_plugins": {"vitcop": "vitcop_vllm.plugin:register"},
        "vllm.endpoint_plugins": {"vitcop": "vitcop_server.plugin:PruningEndpointPlugin"},
    }
