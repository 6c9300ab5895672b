"""Answers that were given already, as JSON lines in a file.

A line is ``{"key": ..., "value": {...}, ...}``; the other fields are for readers. The key is a hash
of everything that the answer depends on: model, images, questions, ratio. A run that was stopped
goes on where it was, because each line is written as its answer comes.
"""

import hashlib
import json
from pathlib import Path
from threading import Lock
from typing import Any


class StateError(ValueError):
    """A state file that another program wrote, or that is damaged."""


def key_of(**facts: Any) -> str:
    """A key from what an answer depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class State:
    """Values by key, in memory and, if there is a path, in its file.

    Raises:
        StateError: If the file has a bad line before its last. A last line that was cut off, by a
            kill or a full disk, is dropped.
        OSError: If the file cannot be read or written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._values: dict[str, dict[str, Any]] = {}
        self._lock = Lock()
        self._file = None
        if path is None:
            return
        whole = 0
        content = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                if whole + len(line) == len(content) and not line.endswith(b"\n"):
                    break
                raise StateError(f"{path}:{number} is no line of a state file") from None
            whole += len(line)
        self._file = path.open("ab")
        self._file.truncate(whole)
        if whole and not content[:whole].endswith(b"\n"):
            self._file.write(b"\n")

    def get(self, key: str) -> dict[str, Any] | None:
        return self._values.get(key)

    def put(self, key: str, value: dict[str, Any], **notes: Any) -> None:
        """Add a value, and write it at once. ``notes`` are for people who read the file."""
        line = json.dumps({"key": key, **notes, "value": value}, ensure_ascii=False) + "\n"
        with self._lock:
            self._values[key] = value
            if self._file is not None:
                self._file.write(line.encode(errors="surrogatepass"))
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
