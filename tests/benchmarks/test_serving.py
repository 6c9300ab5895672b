"""Starting servers, and stopping them with all their processes."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import openai
import pytest
from PIL import Image

from benchmarks.serving import ServerError, running_server, server_arguments
from tests.server import process


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {checkpoint}\ndtype: float32\nmax-model-len: 2048\nenforce-eager: true\n"
        "kv-cache-memory-bytes: 256M\n"
        "pruning:\n  shallow_boundary: 2\n"
    )
    return path


def test_selectors_of_the_encoder_need_only_their_name(config):
    arguments = server_arguments("vitcop", config)
    assert arguments == ["--config", str(config), "--pruning", '{"selector": "vitcop"}']


@pytest.mark.parametrize("selector", ["key_norm", "fastv", "dart"])
def test_selectors_of_the_decoder_lower_the_largest_ratio(config, selector):
    arguments = server_arguments(selector, config)
    # The first 2 of 8 layers compute every token.
    assert json.loads(arguments[3]) == {"selector": selector, "max_pruning_ratio": 0.75}
    batch = ["--max-num-batched-tokens", "2048"] if selector == "fastv" else []
    assert arguments[4:] == batch


def test_a_lower_configured_limit_stays(config):
    config.write_text(config.read_text() + "  max_pruning_ratio: 0.5\n")
    assert json.loads(server_arguments("dart", config)[3])["max_pruning_ratio"] == 0.5


def processes(group: int | None = None, *, command: str = "") -> list[int]:
    """Ids of the processes in a group, or with ``command`` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(ProcessLookupError, FileNotFoundError):
            if not entry.name.isdigit():
                continue
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            matches = group is None or os.getpgid(int(entry.name)) == group
            words = (entry / "cmdline").read_text().replace("\0", " ")
            if matches and command in words and state != "Z":
                found.append(int(entry.name))
    return found


def server_group(config: Path) -> int:
    """Wait for the server of ``config``; its process group."""
    deadline = time.monotonic() + 120
    while not (found := processes(command=f"-m vitcop_server --config {config}")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return os.getpgid(found[0])


def test_a_bad_configuration_is_refused(config):
    config.write_text(config.read_text() + "  shallow: 3\n")
    with pytest.raises(ServerError, match=r"tiny\.yaml: .*Did you mean 'shallow_boundary'"):
        server_arguments("dart", config)
    config.write_text("model: [\n")
    with pytest.raises(ServerError, match=r"(?s)tiny\.yaml: .*expected"):
        server_arguments("dart", config)


def assert_gone(group: int) -> None:
    """Wait for a killed process group to disappear."""
    deadline = time.monotonic() + 10
    while left := processes(group):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.slow
def test_a_stopped_server_s_error_holds_its_log(config):
    config.write_text(config.read_text() + "  max_pruning_ratio: 2.0\n")
    expected = pytest.raises(ServerError, match=r"(?s)the server stopped.*max_pruning_ratio")
    with expected, running_server("--config", str(config)):
        pass


@pytest.mark.slow
def test_a_server_answers_and_is_stopped(config):
    with process.running_server(*server_arguments("key_norm", config)) as (url, _):
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="none").models.list().data
        group = server_group(config)
        assert group != os.getpgid(0)
        assert len(processes(group)) > 1
    assert_gone(group)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_signals_stop_the_server_too(config, number, status):
    Image.new("RGB", (32, 32)).save(config.parent / "a.png")
    turn = {"question": "What?", "answers": ["That."]}
    line = {"images_file_names": ["a.png"], "family": "one", "turns": [turn]}
    (config.parent / "metadata.jsonl").write_text(json.dumps(line))
    arguments = ["--config", str(config), "--data", str(config.parent)]
    harness = subprocess.Popen(
        [sys.executable, "-m", "evaluation.evaluate", *arguments],
        stderr=subprocess.PIPE,
        # As from a terminal; other parents may ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        group = server_group(config)
        harness.send_signal(number)
        _, log = harness.communicate(timeout=120)
        assert harness.returncode == status, log.decode()
        assert b"Traceback" not in log
        assert_gone(group)
    finally:
        harness.kill()
