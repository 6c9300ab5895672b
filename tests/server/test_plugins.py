"""The launcher sets VLLM_PLUGINS."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from vitcop_server import plugins


def test_the_user_s_plugins_are_kept() -> None:
    environ = {"VLLM_PLUGINS": "mine,other"}
    plugins.allow_plugin(environ)
    assert environ["VLLM_PLUGINS"] == "mine,other,vitcop"


@pytest.mark.parametrize("chosen", ["", "vitcop"])
def test_our_plugin_is_named_once(chosen: str) -> None:
    environ = {"VLLM_PLUGINS": chosen}
    plugins.allow_plugin(environ)
    assert environ["VLLM_PLUGINS"] == "vitcop"


def fake_entry_points(monkeypatch: pytest.MonkeyPatch, *found: EntryPoint) -> None:
    def entry_points(*, group: str, name: str | None = None) -> list[EntryPoint]:
        return [e for e in found if e.group == group and name in (None, e.name)]

    monkeypatch.setattr(plugins, "entry_points", entry_points)


def test_unset_keeps_all_plugins_except_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_entry_points(
        monkeypatch,
        EntryPoint("lora", "x:y", "vllm.general_plugins"),
        EntryPoint("chip", "x:y", "vllm.platform_plugins"),
        EntryPoint("page", "x:y", "vllm.endpoint_plugins"),
    )
    environ: dict[str, str] = {}
    plugins.allow_plugin(environ)
    assert environ["VLLM_PLUGINS"] == "lora,chip,vitcop"


@pytest.mark.parametrize(("chosen", "left"), [("mine,vitcop,other", "mine,other"), ("vitcop", "")])
def test_our_plugin_is_left_out(chosen: str, left: str) -> None:
    environ = {"VLLM_PLUGINS": chosen}
    plugins.leave_out_plugin(environ)
    assert environ["VLLM_PLUGINS"] == left


def test_all_other_plugins_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("lora", "vitcop")
    found = [EntryPoint(name, "x:y", "vllm.general_plugins") for name in names]
    fake_entry_points(monkeypatch, *found)
    environ: dict[str, str] = {}
    plugins.leave_out_plugin(environ)
    assert environ["VLLM_PLUGINS"] == "lora"


def test_a_missing_plugin_stops_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_entry_points(monkeypatch, EntryPoint("vitcop", "os:path", "vllm.general_plugins"))
    with pytest.raises(SystemExit, match=r"vllm\.endpoint_plugins.*pip install"):
        plugins.require_plugin()


def test_a_broken_plugin_stops_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_entry_points(
        monkeypatch,
        EntryPoint("vitcop", "os:path", "vllm.general_plugins"),
        EntryPoint("vitcop", "no_such_module:x", "vllm.endpoint_plugins"),
    )
    with pytest.raises(SystemExit, match="no_such_module"):
        plugins.require_plugin()


def test_the_error_names_the_file_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: EntryPoint) -> None:
        Path("/no/such/directory/counters.db").read_bytes()

    monkeypatch.setattr(EntryPoint, "load", load)
    with pytest.raises(SystemExit, match=r"FileNotFoundError: .*'/no/such/directory/counters\.db'"):
        plugins.require_plugin()


def test_installed_plugin_is_found() -> None:
    plugins.require_plugin()
