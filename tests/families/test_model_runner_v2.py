"""Model runner V2 gives the answers of V1, which other tests compare with the dense oracle."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from tests.worker.v2_engine import REQUESTS, Results, collect_results


@pytest.fixture(scope="module")
def v1(llm) -> Results:
    return collect_results(llm)


@pytest.fixture(scope="module")
def v2(checkpoint, tmp_path_factory) -> Results:
    """In a child process, because vLLM chooses the runner once per process."""
    pytest.importorskip("triton", reason="PyTorch brings Triton on some platforms only")
    path = tmp_path_factory.mktemp("v2") / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.worker.v2_engine", str(checkpoint), str(path)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-8000:]
    return Results(**json.loads(path.read_text()))


@pytest.mark.parametrize("what", [name for name in Results.__annotations__ if name != "graphs"])
def test_model_runner_v2_gives_the_results_of_v1(v1, v2, what):
    assert asdict(v2)[what] == asdict(v1)[what]


def test_preemption_and_graphs_do_not_change_answers(v2):
    assert v2.preempted == v2.from_graphs == v2.together
    assert [len(answer) for answer in v2.together] == [spec.max_tokens for spec in REQUESTS]
    assert len({str(answer) for answer in v2.together}) == len(REQUESTS)


def test_v2_reuses_images_and_runs_graphs(v2):
    assert v2.reused[0] == 0
    assert v2.reused[1] > 0
    assert {2, 4} <= set(v2.graphs) <= {2, 4, 8}
