"""The state file."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from vitcop_server.calibrate.state import State, StateError, key_of


def values(path: Path) -> list[object]:
    with closing(State(path)) as state:
        return [state.get(key) for key in "abc"]


def test_values_are_there_after_a_restart_and_readers_see_notes(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    with closing(State(path)) as state:
        state.put("a", {"text": "é\ud800\n"}, question="Which?")
        assert values(path) == [{"text": "é\ud800\n"}, None, None], "written at once"
    assert b'"question": "Which?"' in path.read_bytes()


@pytest.mark.parametrize("end", [b'{"key": "b", "va', b'{"key": "b"}', b"\xff"])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "state.jsonl"
    with closing(State(path)) as state:
        state.put("a", {"n": 1})
    path.write_bytes(path.read_bytes() + end)
    with closing(State(path)) as state:
        state.put("c", {"n": 3})
    assert values(path) == [{"n": 1}, None, {"n": 3}]


def test_a_whole_line_without_its_newline_stays(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    path.write_bytes(b'{"key": "a", "value": {"n": 1}}')
    with closing(State(path)) as state:
        state.put("b", {"n": 2})
    assert values(path) == [{"n": 1}, {"n": 2}, None]


@pytest.mark.parametrize("line", [b"text\n", b"[1]\n", b"3\n", b'{"key": 1}\n', b"{\n"])
def test_another_file_is_refused_and_left_alone(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(line + line)
    with pytest.raises(StateError, match=r"notes.txt:1 is no line"):
        State(path)
    assert path.read_bytes() == line + line


def test_keys_tell_facts_apart() -> None:
    facts: list[dict[str, Any]] = [
        {"a": 1},
        {"a": "1"},
        {"a": 1, "b": None},
        {"a": ["x", "y"]},
        {"a": ["xy"]},
    ]
    assert len({key_of(**one) for one in facts}) == len(facts)
    assert key_of(a=1, b=2) == key_of(b=2, a=1)
