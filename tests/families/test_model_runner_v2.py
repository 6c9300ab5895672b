"""vLLM's real model runner V2 answers as V1 does, whose answers are the dense oracle's."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from tests.worker.v2_engine import REQUESTS, Seen, see


@pytest.fixture(scope="module")
def v1(llm) -> Seen:
    return see(llm)


@pytest.fixture(scope="module")
def v2(checkpoint, tmp_path_factory) -> Seen:
    """In a process of its own: which runner vLLM has is settled once per process."""
    pytest.importorskip("triton", reason="PyTorch brings Triton on some platforms only")
    path = tmp_path_factory.mktemp("v2") / "seen.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.worker.v2_engine", str(checkpoint), str(path)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-8000:]
    return Seen(**json.loads(path.read_text()))


@pytest.mark.parametrize("what", [name for name in Seen.__annotations__ if name != "graphs"])
def test_model_runner_v2_answers_as_v1(v1, v2, what):
    assert asdict(v2)[what] == asdict(v1)[what]


def test_the_same_is_answered_in_every_way(v2):
    assert v2.preempted == v2.from_graphs == v2.together
    assert [len(answer) for answer in v2.together] == [spec.max_tokens for spec in REQUESTS]
    assert len({str(answer) for answer in v2.together}) == len(REQUESTS)


def test_images_are_reused_and_graphs_are_run(v2):
    assert v2.reused[0] == 0
    assert v2.reused[1] > 0
    assert {2, 4} <= set(v2.graphs) <= {2, 4, 8}
