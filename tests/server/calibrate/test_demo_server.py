"""``vitcop-calibrate`` against real servers."""

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from demo import questions
from evaluation.exam import write_exam
from tests.server.calibrate.rule_server import save_image
from tests.server.clients import CHAT, Server
from vitcop_server.calibrate import server as calibrate_server
from vitcop_server.calibrate.command import main
from vitcop_server.calibrate.folder import Conversation, data_url, read_folder
from vitcop_server.calibrate.measurement import messages_of
from vitcop_vllm.pruning.settings import RATIO_HEADER

pytestmark = pytest.mark.slow

GRID = [0.5, 0.85, 0.888889, 0.92]

BREAKING = [29, 43, 44, 0]
"""Conversations of the exam of seed 0 that break at 0.5, at 8/9, and at higher ratios."""

KEEP = 0.7
"""Of four images, one may break."""


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exam") / "images"
    examples = [*questions.exam(6, seed=0)]
    write_exam(folder, [examples[number] for number in BREAKING])
    return folder


def ask(url: str, one: Conversation, ratio: float, **fields: Any) -> Any:
    content = [{"type": "image_url", "image_url": {"url": data_url(one.images[0])}}]
    content.append({"type": "text", "text": one.questions[0]})
    messages = [{"role": "user", "content": content}]
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 16, **fields}
    answer = httpx.post(url + CHAT, json=body, headers={RATIO_HEADER: str(ratio)}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_the_ratio_found_is_that_of_a_scan(
    demo_url: str, exam: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversations = read_folder(exam, {})
    answers = {
        ratio: [ask(demo_url, one, ratio)["message"]["content"] for one in conversations]
        for ratio in (0.0, *GRID)
    }
    agreeing = {
        ratio: sum(a == b for a, b in zip(given, answers[0.0], strict=True))
        for ratio, given in answers.items()
    }
    least = KEEP * len(conversations)
    passing = [ratio for ratio in GRID if agreeing[ratio] >= least]
    assert 0 < len(passing) < len(GRID), "choose other conversations"
    assert passing == GRID[: len(passing)], "choose other conversations"
    flags = ["--ratios", *map(str, GRID), "--max-tokens", "16", "--measures", "exact"]
    flags += ["--keep", str(KEEP)]
    argv = [str(exam), "--url", demo_url + "/v1", "--state", str(tmp_path / "state"), *flags]
    assert main(argv) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])["calibrate"]
    assert document["observed_ratio"] == passing[-1]
    assert document["repeated"] == {"asked": len(conversations), "changed": 0}
    total = document["groups"][0]["agreement"]
    assert {float(ratio): counts["agreeing"] for ratio, counts in total.items()} == {
        ratio: agreeing[ratio] for ratio in map(float, total)
    }
    saved = {row["ratio"]: row["visual_tokens_saved"] for row in document["costs"]}
    assert all(saved[ratio] == pytest.approx(ratio, abs=0.01) for ratio in saved)


def test_scores_are_the_probabilities_that_the_model_generates_by(
    demo_url: str, exam: Path
) -> None:
    """The first token's, which is found among the most likely first tokens of an answer."""
    server = calibrate_server.Server(demo_url + "/v1", max_tokens=16)
    ratio = GRID[-1]
    for one in read_folder(exam, {})[:2]:
        (messages,) = messages_of(one)
        reply = server.ask(messages, 0.0)
        baseline = server.score_baseline(messages, reply)
        assert baseline.ends
        assert len(baseline.logprobs) == len(reply.token_ids) - 1
        pruned = server.score(messages, reply, baseline, ratio)
        for score, asked in ((baseline, 0.0), (pruned, ratio)):
            choice = ask(
                *(demo_url, one, asked),
                logprobs=True,
                top_logprobs=20,
                return_tokens_as_token_ids=True,
            )
            first = choice["logprobs"]["content"][0]["top_logprobs"]
            likely = {entry["token"]: entry["logprob"] for entry in first}
            expected = likely.get(f"token_id:{reply.token_ids[0]}")
            if expected is None:
                assert score.logprobs[0] < min(likely.values())
            else:
                assert math.isclose(score.logprobs[0], expected, abs_tol=1e-3)


def test_a_ratio_above_the_server_s_largest_is_refused(
    server_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image(tmp_path / "a.png", 0.5)
    assert main([str(tmp_path), "--url", server_url + "/v1", "--ratios", "0.99"]) == 1
    assert "max_pruning_ratio is 0.95" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "words"), [("", "needs a key"), ("wrong", "needs another key")])
def test_a_key_is_needed(
    guarded: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    words: str,
) -> None:
    save_image(tmp_path / "a.png", 0.5)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    url = str(guarded.http.base_url).rstrip("/") + "/v1"
    assert main([str(tmp_path), "--url", url]) == 1
    assert words in capsys.readouterr().err
