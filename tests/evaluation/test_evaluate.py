"""The whole harness, against the real server with a tiny random model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from evaluation.client import UNPRUNED, Ratio, data_url
from evaluation.evaluate import RATIOS, main, parse_arguments
from evaluation.exam import METADATA
from evaluation.scoring import normalise
from tests.engine.requests import sample_image
from tests.pruning.every_selector import SELECTORS
from vitcop_vllm.demo.checkpoint import TINY
from vitcop_vllm.pruning.plan import plan_counts
from vitcop_vllm.pruning.settings import PruningSettings

MAX_TOKENS = 12


def test_default_arguments():
    arguments = parse_arguments([])
    assert (arguments.data, arguments.selectors) == (None, ["vitcop"])
    assert [ratio.label for ratio in arguments.ratios] == list(RATIOS)
    assert arguments.ratios[0] == UNPRUNED


def test_ratios_and_selectors_are_parsed():
    arguments = parse_arguments(["--ratios", "0", "16/18", "none"])
    assert arguments.ratios == [UNPRUNED, Ratio.parse("8/9"), Ratio.parse("none")]
    assert parse_arguments(["--selectors", "cls", "all"]).selectors == list(SELECTORS)
    assert parse_arguments(["--selectors", "cls", "cls"]).selectors == ["cls"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ratios", "1"], "a ratio is a fraction"),
        (["--url", "http://x/v1", "--selectors", "cls"], "name the selector with --label"),
        (["--label", "cls"], "--label names"),
        (["--concurrency", "0"], "--concurrency must be at least 1"),
        (["--selectors", "best"], "invalid choice: 'best'"),
        (["--config", "no-such.yaml"], "no-such.yaml"),
        (["--out", "no-such/a.json"], "there is no folder no-such"),
    ],
)
def test_bad_arguments_are_refused(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(argv)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_bad_exam_is_refused_before_a_request(tmp_path, capsys):
    (tmp_path / METADATA).write_text("{}\n")
    # Nobody listens at this port.
    assert main(["--url", "http://127.0.0.1:9/v1", "--data", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"{tmp_path / METADATA}:1: images_file_names: Field required")
    assert out == ""


@dataclass
class Run:
    """A finished evaluation."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return loaded

    def cell(self, ratio: str) -> dict[str, Any]:
        [found] = [cell for cell in self.document["results"] if cell["ratio"] == ratio]
        return dict(found)


@pytest.fixture(scope="module")
def exam(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose right answers are the unpruned model's answers."""
    folder = tmp_path_factory.mktemp("exam")
    client = openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id

    def answer(messages: list[Any]) -> str:
        made = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_headers={"X-Pruning-Ratio": "0"},
        )
        return made.choices[0].message.content or ""

    def ask(messages: list[Any], images: Sequence[str] = ()) -> dict[str, Any]:
        """A question with a non-empty answer; random models often answer nothing."""
        urls: list[Any] = [
            {"type": "image_url", "image_url": {"url": data_url(folder / name)}} for name in images
        ]
        for number in range(20):
            question = f"What is number {number}?"
            content = [*urls, {"type": "text", "text": question}]
            right = answer([*messages, {"role": "user", "content": content}])
            if normalise(right):
                messages += [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": right},
                ]
                return {"question": question, "answers": ["no", right]}
        raise AssertionError("the model answers nothing")

    names = [f"{seed}.png" for seed in range(4)]
    for seed, name in enumerate(names):
        sample_image(seed).save(folder / name)
    talk: list[Any] = []
    conversations = [
        *(("one", [name], [ask([], [name])]) for name in names),
        ("two", names[2:], [ask([], names[2:])]),
        ("talk", names[:1], [ask(talk, names[:1]), ask(talk)]),
    ]
    lines = [
        {"images_file_names": images, "family": family, "turns": turns}
        for family, images, turns in conversations
    ]
    (folder / METADATA).write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def evaluate(server_url: str, exam: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def run(*argv: str, url: str = f"{server_url}/v1") -> Run:
        tokens = ["--max-tokens", str(MAX_TOKENS), "--concurrency", "3"]
        status = main(["--url", url, "--data", str(exam), *tokens, *argv])
        return Run(status, *capsys.readouterr())

    return run


@pytest.mark.slow
def test_every_ratio_is_measured_on_a_real_server(evaluate, tmp_path):
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    ratios = ("0", "1/2", "8/9", "0.99")
    run = evaluate("--ratios", *ratios, "--label", "vitcop", "--out", str(out), "--plot", str(png))
    assert run.status == 0, run.err
    assert "24/24" in run.err

    unpruned = run.cell("0")
    assert unpruned["selector"] == "unpruned"
    assert {name: one["accuracy"] for name, one in unpruned["accuracy"].items()} == {
        "one": 1.0,
        "two": 1.0,
        "talk": 1.0,
        "mean": 1.0,
    }
    assert unpruned["accuracy"]["one"]["total"] == 4
    assert unpruned["scores"]["talk"] == [[1.0, 1.0]]
    assert unpruned["effective_ratio"] == 0
    # Six requests with one image, as the conversation has two turns, and one with two.
    assert unpruned["visual_tokens"] == pytest.approx((6 * 256 + 512) / 7)

    settings = PruningSettings()
    for label in ("1/2", "8/9"):
        value = float(Ratio.parse(label).decimal or 0)
        counts = plan_counts(settings, value, TINY.layers, TINY.visual_tokens)
        average = counts.layer_average(settings.boundaries(TINY.layers), TINY.layers)
        cell = run.cell(label)
        assert cell["selector"] == "vitcop"
        assert cell["stages"] == pytest.approx([8 * kept / 7 for kept in counts.stages])
        assert cell["effective_ratio"] == pytest.approx(1 - average / TINY.visual_tokens)
        assert cell["visual_tokens"] == pytest.approx(8 * average / 7)
        assert cell["errors"] == {}
        mean = cell["accuracy"]["mean"]["accuracy"]
        assert cell["difference"]["mean"]["difference"] == pytest.approx(mean - 1)

    refused = run.cell("0.99")
    assert "decimal number from 0 to 0.95" in refused["refusal"]
    lines = [line.strip() for line in run.out.splitlines() if line.strip()]
    assert lines[0].split() == ["vitcop", *ratios]
    [mean_line] = [line for line in lines if line.startswith("mean")][:1]
    assert mean_line.endswith(" -")
    assert run.out.count(f"- {refused['refusal']}\n") == 1

    assert json.loads(out.read_text()) == run.document
    assert png.read_bytes().startswith(b"\x89PNG")
    conditions = run.document["conditions"]
    assert conditions["vllm"].startswith("0.32")
    assert conditions["examples"] == {"one": 4, "two": 1, "talk": 1}


@pytest.mark.slow
def test_an_earlier_run_is_continued(evaluate, tmp_path):
    out = ("--label", "vitcop", "--out", str(tmp_path / "out.json"))
    assert evaluate("--ratios", "0", *out).status == 0
    run = evaluate("--ratios", "0", "8/9", *out)
    assert "6/6" in run.err, "ratio 0 must not be measured again"
    assert [cell["ratio"] for cell in run.document["results"]] == ["0", "8/9"]
    assert "difference" in run.cell("8/9")
    other = evaluate("--ratios", "0", "--max-tokens", "3", *out)
    assert (other.status, other.err.strip().splitlines()[-1]) == (
        2,
        f"the earlier run had max_tokens {MAX_TOKENS}, this one has 3",
    )


@pytest.mark.slow
def test_ratio_none_gets_the_server_s_default(evaluate):
    run = evaluate("--ratios", "none")
    assert run.status == 0
    assert run.cell("none")["accuracy"]["mean"]["accuracy"] == 1.0
    assert run.cell("none")["effective_ratio"] == 0


@pytest.mark.slow
def test_a_server_that_answers_nothing_ends_the_run(evaluate):
    run = evaluate("--ratios", "0", "1/2", "--model", "no-such-model")
    assert run.status == 1
    assert "no answer at ratio 0" in run.err
    assert "no-such-model" in run.err
    # The second ratio was not tried.
    assert [cell["ratio"] for cell in run.document["results"]] == ["0"]
    assert run.cell("0")["errors"].popitem()[1] == 6


@pytest.mark.slow
def test_other_answers_count_after_a_failure(evaluate, exam, tmp_path):
    lines = (exam / METADATA).read_text().splitlines()
    long = json.loads(lines[1])
    long["turns"][0]["question"] = "What is it? " * 400  # longer than the model's 2048 tokens
    for name in exam.glob("*.png"):
        (tmp_path / name.name).write_bytes(name.read_bytes())
    (tmp_path / METADATA).write_text("\n".join([lines[0], json.dumps(long)]))
    run = evaluate("--data", str(tmp_path), "--ratios", "0")
    assert run.status == 1
    assert run.cell("0")["scores"] == {"one": [[1.0], None]}
    assert "FAILED: 1 examples" in run.err
    assert "! 1 x " in run.out


def test_an_unreachable_server_is_reported(tmp_path, capsys):
    sample_image(0).save(tmp_path / "0.png")
    turn = {"question": "What?", "answers": ["That."]}
    line = {"images_file_names": ["0.png"], "family": "one", "turns": [turn]}
    (tmp_path / METADATA).write_text(json.dumps(line))
    # Nobody listens at this port.
    assert main(["--url", "http://127.0.0.1:9/v1", "--data", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "http://127.0.0.1:9/v1 lists no model: Connection error." in err
    assert out == ""
