"""Reads the deployment files."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def compose(environ: dict[str, str] | None = None) -> dict[str, Any]:
    """The compose file with its variables replaced by ``environ`` or by their defaults.

    Raises:
        ValueError: If a variable has neither a value nor a default.
    """

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        value = (environ or {}).get(name) or default
        if value is None:
            raise ValueError(f"{name} has no default")
        return value

    text = (DOCKER / "docker-compose.yml").read_text()
    document: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(replace, text))
    return document


def seconds(duration: str) -> float:
    """Compose's ``90s``, ``5m`` or ``1m30s`` in seconds."""
    parts = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert parts is not None, duration
    minutes, rest = (int(part or 0) for part in parts.groups())
    return 60 * minutes + rest
