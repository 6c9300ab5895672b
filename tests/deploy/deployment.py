"""Runs ``docker compose`` on the project's file, as a project of its own name."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.docker.files import DOCKER
from tests.docker.test_proxy import free_port

CPU_REPLICAS = Path(__file__).with_name("cpu-replicas.yml")

KEY = "a key for this check"

START_S = 300
"""Seconds that a server has to start, beside others on two cores."""


def docker(
    *arguments: str,
    check: bool = True,
    timeout: float = 1800,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Output of a docker command; ``variables`` are added to its environment.

    Raises:
        AssertionError: If it fails; the message has its errors.
    """
    done = subprocess.run(
        ["docker", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, **(variables or {})},
    )
    output = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert not check or done.returncode == 0, f"docker {' '.join(arguments)}\n{output}"
    return done.stdout


def wait_until(condition: Callable[[], bool], what: str, timeout: float = START_S) -> float:
    """Seconds until a condition holds.

    Raises:
        AssertionError: If it does not hold in time.
    """
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + timeout, f"after {timeout} s: not {what}"
        time.sleep(0.2)
    return time.monotonic() - begin


@dataclass
class Deployment:
    """Profiles of the compose file that are up.

    Attributes:
        profiles: Names of the profiles.
        files: Compose files that override the project's.
        port: Of the proxy, on this machine.
    """

    profiles: tuple[str, ...]
    files: tuple[Path, ...] = ()
    port: int = field(default_factory=free_port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def compose(
        self, *arguments: str, check: bool = True, variables: Mapping[str, str] | None = None
    ) -> str:
        """Output of ``docker compose``; ``variables`` of the compose file are for this call."""
        command = ["compose", "--project-name", "vitcop-check"]
        for file in (DOCKER / "docker-compose.yml", *self.files):
            command += ["--file", str(file)]
        for profile in self.profiles:
            command += ["--profile", profile]
        all_variables = {"PORT": str(self.port), "VLLM_API_KEY": KEY, **(variables or {})}
        return docker(*command, *arguments, check=check, variables=all_variables)

    def up(self, *arguments: str, **variables: str) -> None:
        self.compose("up", "--wait", *arguments, variables=variables)

    def state(self, service: str) -> dict[str, Any]:
        """State of a service's container, with its id and restarts."""
        (identifier,) = self.compose("ps", "--all", "--quiet", service).split()
        (found,) = json.loads(docker("inspect", identifier))
        state: dict[str, Any] = found["State"]
        return {**state, "Id": identifier, "RestartCount": found["RestartCount"]}

    def is_healthy(self, service: str) -> bool:
        state = self.state(service)
        return state["Status"] == "running" and state["Health"]["Status"] == "healthy"

    def python(self, service: str, code: str, check: bool = True) -> str:
        """Output of a Python program in a server's container, as the server's user."""
        return self.compose("exec", "--no-TTY", service, "python", "-c", code, check=check)

    def kill(self, service: str, name: str) -> None:
        """SIGKILL every process of a server whose name begins with ``name``."""
        killed = self.python(
            service,
            "import os, pathlib\n"
            "for file in pathlib.Path('/proc').glob('[0-9]*/comm'):\n"
            f"    if file.read_text().startswith({name!r}):\n"
            "        os.kill(int(file.parent.name), 9)\n"
            "        print(file.parent.name)\n",
        )
        assert killed, f"no process {name} in {service}"

    def come_back(self, service: str, kill: Callable[[], object]) -> tuple[float, float]:
        """Seconds until a killed server's container starts again, and from then until healthy."""
        before = self.state(service)["StartedAt"]
        kill()
        gone = wait_until(lambda: self.state(service)["StartedAt"] != before, "started again")
        return gone, wait_until(lambda: self.is_healthy(service), "healthy")

    def log(self, service: str, since: str) -> str:
        return self.compose("logs", "--no-log-prefix", "--since", since, service)


@contextmanager
def deployed(
    *profiles: str, files: tuple[Path, ...] = (), services: Sequence[str] = ()
) -> Iterator[Deployment]:
    """Bring profiles up, or these services of them, and take them down with their volumes."""
    deployment = Deployment(profiles, files)
    try:
        deployment.up(*services)
        yield deployment
    finally:
        deployment.compose("down", "--volumes", "--timeout", "60")
