"""The whole harness, against the real server with a tiny random model."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from evaluation.client import converse, text_of
from evaluation.evaluate import main, parse_arguments
from evaluation.exam import Example, Turn
from evaluation.scoring import normalise
from tests.engine.requests import sample_image
from vitcop_server.calibrate.folder import METADATA
from vitcop_vllm.demo.checkpoint import TINY
from vitcop_vllm.pruning.plan import plan_counts
from vitcop_vllm.pruning.settings import PruningSettings

MAX_TOKENS = 12


@pytest.mark.parametrize("ratio", ["1", "9/8", "-1", "8/0", "", "nan", "none"])
def test_bad_ratios_are_refused(ratio, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--ratios", "0", ratio])
    assert "is no fraction or decimal number" in capsys.readouterr().err


@dataclass
class Run:
    """A finished evaluation."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture(scope="module")
def exam(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose right answers are the unpruned model's answers."""
    folder = tmp_path_factory.mktemp("exam")
    client = openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id

    def line(family: str, names: list[str], turns: int) -> dict[str, Any]:
        """A conversation with non-empty answers; random models often answer nothing."""
        images = tuple(folder / name for name in names)
        for number in range(20):
            turn = Turn(question=f"What is number {number}?", answers=("?",))
            example = Example(images=images, family=family, turns=(turn,) * turns)
            answers = [text_of(one) for one in converse(client, model, MAX_TOKENS, example)]
            if all(map(normalise, answers)):
                asked = [{"question": turn.question, "answers": ["no", a]} for a in answers]
                return {"images_file_names": names, "family": family, "turns": asked}
        raise AssertionError("the model answers nothing")

    names = [f"{seed}.png" for seed in range(4)]
    for seed, name in enumerate(names):
        sample_image(seed).save(folder / name)
    lines = [
        *(line("one", [name], 1) for name in names),
        line("two", names[2:], 1),
        line("talk", names[:1], 2),
    ]
    (folder / METADATA).write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def evaluate(server_url: str, exam: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def run(*argv: str) -> Run:
        tokens = ["--max-tokens", str(MAX_TOKENS), "--concurrency", "3"]
        status = main(["--url", f"{server_url}/v1", "--data", str(exam), *tokens, *argv])
        return Run(status, *capsys.readouterr())

    return run


@pytest.mark.slow
def test_every_ratio_is_measured_on_a_real_server(evaluate, tmp_path):
    png = tmp_path / "out.png"
    run = evaluate("--ratios", "0", "1/2", "8/9", "auto", "--plot", str(png))
    assert run.status == 0, run.err
    [answers] = run.document["answers"]
    assert answers["0"] == 100
    families = {row["family"]: row for row in run.document["families"]}
    assert {name: row["0"] for name, row in families.items()} == dict.fromkeys(families, 100)
    mean = sum(row["8/9"] for row in families.values()) / 3
    assert answers["8/9"] == pytest.approx(mean, abs=0.1)
    assert run.document["less_ratio_0"][-1]["8/9"] == pytest.approx(mean - 100, abs=0.1)

    settings = PruningSettings()
    tokens = {row["ratio"]: row for row in run.document["tokens"]}
    # Six requests with one image, as the conversation has two turns, and one with two.
    images = 8 / 7
    assert tokens["0"]["stages"] == pytest.approx([256 * images] * 3, abs=0.1)
    for ratio, value in (("1/2", 1 / 2), ("8/9", 8 / 9)):
        counts = plan_counts(settings, value, TINY.layers, TINY.visual_tokens)
        average = counts.layer_average(settings.boundaries(TINY.layers), TINY.layers)
        assert tokens[ratio]["stages"] == pytest.approx(
            [images * n for n in counts.stages], abs=0.1
        )
        assert tokens[ratio]["pruned"] == pytest.approx(1 - average / TINY.visual_tokens, abs=1e-4)

    assert 7 / 9 - 0.01 < tokens["auto"]["pruned"] < 11 / 12 + 0.01

    assert png.read_bytes().startswith(b"\x89PNG")
    assert f"--plot {png}" in run.document["conditions"]["command"]


@pytest.mark.slow
def test_a_failure_ends_the_run_and_keeps_what_was_measured(evaluate):
    run = evaluate("--ratios", "0", "0.99", "1/2")
    assert run.status == 1
    assert "decimal number from 0 to 0.95" in run.err.splitlines()[-1]
    assert [row["ratio"] for row in run.document["tokens"]] == ["0"]


def test_a_bad_exam_is_refused_before_a_request(tmp_path, capsys):
    (tmp_path / METADATA).write_text("{}\n")
    # Nobody listens at this port.
    assert main(["--url", "http://127.0.0.1:9/v1", "--data", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"{tmp_path / METADATA}:1: ")
    assert out == ""


def test_an_unreachable_server_is_reported(tmp_path, capsys):
    sample_image(0).save(tmp_path / "0.png")
    turn = {"question": "What?", "answers": ["That."]}
    line = {"images_file_names": ["0.png"], "family": "one", "turns": [turn]}
    (tmp_path / METADATA).write_text(json.dumps(line))
    assert main(["--url", "http://127.0.0.1:9/v1", "--data", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "FAILED: http://127.0.0.1:9/v1: Connection error." in err
    assert out == ""
