"""Sources of a vLLM release, and a folder from which its Python files run on a CPU.

There is no CPU build of vLLM 0.33. ``python -m tools.vllm_sources 0.33.0 FOLDER`` makes a folder
with its Python files, the compiled libraries of the installed CPU build, and newer versions of
packages that it requires. With the folder on ``PYTHONPATH``, Python imports vLLM 0.33.0 from it.
The compiled libraries and torch remain those of the installed build.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import Request, urlopen

from packaging.requirements import Requirement

REQUIREMENTS = "requirements/common.txt"
INDEX = "https://pypi.org/simple/vllm/"
CACHE = Path(__file__).parents[1] / ".cache" / "vllm"


def fetch(version: str) -> Path:
    """The source archive of a release, downloaded once.

    Raises:
        SystemExit: If the index has no such release, or the hash does not match.
    """
    name = f"vllm-{version}.tar.gz"
    path = CACHE / name
    if path.exists():
        return path
    wanted = Request(INDEX, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urlopen(wanted) as answer:
        files = {file["filename"]: file for file in json.load(answer)["files"]}
    if name not in files:
        raise SystemExit(f"{INDEX} has no {name}")
    with urlopen(urljoin(INDEX, files[name]["url"])) as answer:
        data = answer.read()
    if hashlib.sha256(data).hexdigest() != files[name]["hashes"]["sha256"]:
        raise SystemExit(f"{name} does not have the SHA-256 that {INDEX} states")
    CACHE.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def unpack(version: str) -> Path:
    """A folder with the release's package ``vllm`` and its requirements, unpacked once."""
    folder = CACHE / version
    if not folder.exists():
        partly = CACHE / f"{version}.partly"
        shutil.rmtree(partly, ignore_errors=True)
        prefix = f"vllm-{version}/"
        with tarfile.open(fetch(version)) as archive:
            for member in archive:
                member.name = member.name.removeprefix(prefix)
                if member.name.startswith("vllm/") or member.name == REQUIREMENTS:
                    archive.extract(member, partly, filter="data")
        partly.rename(folder)
    return folder


def overlay(version: str, folder: Path) -> None:
    """Make ``folder`` an import path of the release, with the installed build's libraries.

    Raises:
        SystemExit: If no vLLM is installed.
    """
    from importlib.util import find_spec

    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("install vLLM first: its compiled libraries are needed")
    installed = Path(spec.origin).parent
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(unpack(version), folder)
    for library in installed.rglob("*.so"):
        (folder / "vllm" / library.relative_to(installed)).symlink_to(library)
    # vLLM reads its version here; "+cpu" marks a CPU build.
    metadata = folder / f"vllm-{version}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}+cpu\n")

    if newer := [*_unsatisfied(folder / REQUIREMENTS)]:
        uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*uv, "--target", str(folder), *newer], check=True)


def _unsatisfied(requirements: Path) -> Iterator[str]:
    """Requirements that the running environment does not meet."""
    for line in requirements.read_text().splitlines():
        if not (text := line.partition("#")[0].strip()):
            continue
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            is_met = wanted.specifier.contains(installed_version(wanted.name), prereleases=True)
        except PackageNotFoundError:
            is_met = False
        if not is_met:
            yield str(wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="a vLLM release, such as 0.33.0")
    parser.add_argument("folder", type=Path, help="folder to make; existing content is deleted")
    arguments = parser.parse_args()
    overlay(arguments.version, arguments.folder)


if __name__ == "__main__":
    main()
