"""``vitcop-calibrate`` on a server whose rules are known."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.calibrate.rule_server import (
    REFUSED,
    RuleServer,
    save_image,
    save_images,
    serving,
)
from vitcop_server.calibrate.command import GRID, main, parse_arguments, parse_ratio

RATIOS = [parse_ratio(ratio) for ratio in GRID]

ONE = ["--question", "Q"]


@pytest.fixture
def rules() -> Iterator[RuleServer]:
    with serving(RuleServer()) as rules:
        yield rules


@pytest.fixture
def run(
    rules: RuleServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, Any]]:
    """Runs the command on ``tmp_path``; returns its status, its text and its document."""

    def run(*flags: str, status: int = 0) -> tuple[int, str, Any]:
        code = main([str(tmp_path / "images"), "--url", rules.url, *flags])
        captured = capsys.readouterr()
        assert code == status, captured.err
        if code:
            return code, captured.err, None
        *lines, document = captured.out.splitlines()
        return code, "\n".join(lines), json.loads(document)["calibrate"]

    return run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path / "images"


def test_a_ratio_is_proven_on_enough_images(run, rules: RuleServer, images: Path) -> None:
    """100 images prove 95 % with one break, which is so until 0.82; 5 break until 0.87."""
    save_images(images, [0.72, 0.82, 0.83, 0.84, 0.87, 0.88, *[0.99] * 94])
    _, text, document = run(*ONE, "--keep", "0.95", "--measures", "exact")
    assert document["proven_ratio"] == 0.8
    assert document["observed_ratio"] == 0.85
    assert "Proven by exact: at ratio 0.8 at least 95.3 % of such images agree." in text
    assert text.endswith("pruning:\n  default_ratio: 0.8\n")
    agreement = document["groups"][0]["agreement"]
    for ratio in map(float, agreement):
        broken = sum(ratio >= one for one in (0.72, 0.82, 0.83, 0.84, 0.87, 0.88))
        assert agreement[f"{ratio:.6g}"]["agreeing"] == 100 - broken
    assert len(agreement) < len(RATIOS), "a bisection does not ask at all ratios"


def test_too_few_images_prove_nothing_and_the_report_says_how_many_are_needed(
    run, images: Path
) -> None:
    save_images(images, [0.72, *[0.99] * 29])
    _, text, document = run(*ONE)
    assert (document["proven_ratio"], document["observed_ratio"]) == (0.0, 0.7)
    assert document["images_needed"] == 299
    assert "These images are too few: 30 can prove at most 90.4 %, if all agree." in text
    assert "99 % needs 299 images that all agree, or 473 with one break." in text
    assert "Observed only: at ratio 0.7, 30 of 30 images agree, which proves 90.4 %." in text
    assert re.search(r"^# Not proven.*\n# pruning:\n#   default_ratio: 0.7$", text, re.MULTILINE)
    assert not re.search(r"^pruning:", text, re.MULTILINE)


def test_nothing_observed(run, images: Path) -> None:
    save_images(images, [0.05] * 3)
    _, text, document = run(*ONE)
    assert document["observed_ratio"] == 0
    assert "# No ratio of the grid keeps the goal" in text


def test_kinds_and_uses_get_ratios_of_their_own(run, images: Path) -> None:
    save_images(images / "forms", [0.55] * 3)
    save_images(images / "photos", [0.9] * 3)
    _, _, document = run("--use", "read", "count")
    found = {
        (one["kind"], one["use"]): one["observed_ratio"]
        for one in document["groups"]
        if one["measure"] == "exact"
    }
    expected = {"all": 0.5, "forms": 0.5, "photos": round(8 / 9, 6)}
    assert found == {
        (kind, use): ratio for kind, ratio in expected.items() for use in ("all", "read", "count")
    }


def test_costs_and_the_images_that_break_first(run, images: Path) -> None:
    save_images(images, [0.55, 0.65, 0.99])
    _, text, document = run(*ONE, "--scan")
    costs = {row["ratio"]: row for row in document["costs"]}
    assert list(costs) == [0.0, *RATIOS]
    assert costs[0.5]["visual_tokens_saved"] == pytest.approx(0.5)
    assert costs[0.5]["prompt_tokens"] == 60
    assert document["time"]["ratio"] == 0.5
    assert document["time"]["share"] > 0
    assert "than at ratio 0\n(median of 3 pairs, one request after the other)." in text
    assert [(one["ratio"], one["images"], one["pruned"]) for one in document["breaks"]] == [
        (0.6, "0.png", "no"),
        (0.666667, "1.png", "no"),
    ]
    assert "0.6    0.png  Q         Q after nothing  no" in text


def test_a_second_run_asks_nothing_and_says_the_same(
    run, rules: RuleServer, images: Path, tmp_path: Path
) -> None:
    save_images(images, [0.72, 0.9, 0.99])
    flags = ("--use", "read", "count", "--state", str(tmp_path / "state.jsonl"))
    _, text, _ = run(*flags)
    asked = len(rules.requests), len(rules.scorings)
    assert run(*flags)[1] == text
    assert (len(rules.requests), len(rules.scorings)) == asked
    rules.settings = {"max_pruning_ratio": 0.95, "selector": "random"}
    run(*flags)
    assert len(rules.requests) == 2 * asked[0], "other settings give other answers"
    rules.settings |= {"default_ratio": 0.5}
    run(*flags)
    assert len(rules.requests) == 2 * asked[0]


def test_a_run_that_failed_goes_on_where_it_was(
    run, rules: RuleServer, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *a: 0)
    save_images(images, [0.72, 0.9, *[0.99] * 6])
    state = tmp_path / "state.jsonl"
    flags = (*ONE, "--state", str(state), "--concurrency", "1")
    rules.fails_from = 10
    _, error, _ = run(*flags, status=1)
    assert "out of order (status 500)" in error
    assert f"Run again to go on: earlier answers are in {state}" in error
    assert len(state.read_text().splitlines()) == 10
    rules.fails_from, rules.requests[:] = None, []
    _, resumed, _ = run(*flags)
    first = len(rules.requests)
    _, whole, _ = run(*ONE, "--concurrency", "1")
    assert len(rules.requests) - first == first + 10
    assert without_time(resumed) == without_time(whole)


def without_time(text: str) -> str:
    return re.sub(r"\S+ % (less|more)", "", text)


def test_later_turns_are_compared_with_the_unpruned_history(
    run, rules: RuleServer, images: Path
) -> None:
    """The rules repeat the history, so a pruned first answer would change the second."""
    for number, breaks in enumerate((0.55, 0.99)):
        save_image(images / f"{number}.png", breaks, number)
    turns = [{"question": "One?"}, {"question": "Two?"}]
    names = ["0.png", "1.png"]
    lines = [{"images_file_names": [name], "family": "talk", "turns": turns} for name in names]
    (images / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, _, document = run()
    assert document["observed_ratio"] == 0.5
    (break_,) = document["breaks"]
    assert (break_["question"], break_["unpruned"]) == ("One?", "One? after nothing")


@pytest.mark.parametrize("space", ["", " "])
def test_answers_are_scored_whatever_the_template_does_with_spaces(
    run, rules: RuleServer, images: Path, space: str
) -> None:
    rules.space = space
    save_images(images, [0.72, 0.99])
    _, _, document = run(*ONE, "--measures", "logprob", "exact")
    assert document["unscored"] == 0
    assert [one["measure"] for one in document["groups"]] == ["logprob", "exact"]
    assert [one["observed_ratio"] for one in document["groups"]] == [0.7, 0.7]


def test_a_looser_measure_finds_a_higher_ratio(run, images: Path) -> None:
    """By the rules, a token of a changed answer keeps exp(-2.9), 5.5 %, of its probability."""
    save_images(images, [0.72, 0.99])
    _, _, document = run(*ONE, "--measures", "logprob", "--least", "0.05")
    assert document["observed_ratio"] == RATIOS[-1]


def test_without_scoring_the_measure_is_exact(run, rules: RuleServer, images: Path) -> None:
    rules.scores = False
    save_images(images, [0.72, 0.99])
    _, text, document = run(*ONE, "--measures", "logprob", "exact")
    assert [one["measure"] for one in document["groups"]] == ["exact"]
    assert document["observed_ratio"] == 0.7
    assert "The server does not score answers" in text


@pytest.mark.parametrize("settings", [{"max_pruning_ratio": 0.72}, None])
def test_the_grid_ends_at_the_server_s_largest_ratio(
    run, rules: RuleServer, images: Path, settings: dict[str, Any] | None
) -> None:
    """A gateway may not forward the route with the settings."""
    rules.settings, rules.largest = settings, 0.72
    save_images(images, [0.99] * 2)
    _, text, document = run(*ONE)
    assert document["observed_ratio"] == 0.7
    assert "The server does not take the ratios 0.75 0.7778 0.8 0.85 0.8889 0.92 0.9444" in text


def test_refused_images_are_left_out_and_listed(run, images: Path) -> None:
    save_images(images, [0.72, 0.99])
    save_image(images / "sky.png", 0.1, 99, blue=REFUSED)
    _, text, document = run(*ONE)
    assert (document["images"], document["observed_ratio"]) == (2, 0.7)
    assert document["refused"] == [{"images": "sky.png", "message": "the image is too blue"}]
    assert "left out, such as sky.png: the image is too blue" in text


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"has_plugin": False}, "this server runs without ViTCoP's plugin and ignores"),
        ({"has_plugin": False, "settings": None}, "this server runs without ViTCoP's plugin"),
        ({"sees_header": False}, "pruned nothing at ratio 0.7: does a proxy drop the header?"),
        ({"settings": {"max_pruning_ratio": 0.05}}, "its max_pruning_ratio is 0.05"),
        ({"settings": None, "largest": 0.05}, "X-Pruning-Ratio must be at most 0.05"),
    ],
)
def test_a_server_that_cannot_be_measured_is_refused(
    run, rules: RuleServer, images: Path, rule: dict[str, Any], words: str
) -> None:
    for name, value in rule.items():
        setattr(rules, name, value)
    save_images(images, [0.99] * 2)
    assert words in run(*ONE, status=1)[1]


def test_every_image_is_refused(run, images: Path) -> None:
    save_image(images / "a.png", 0.5, blue=REFUSED)
    assert "refuses every image: the image is too blue" in run(status=1)[1]


def test_no_server_answers(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_images(images, [0.5])
    assert main([str(images), "--url", "http://127.0.0.1:9/v1"]) == 1
    assert capsys.readouterr().err == "no server answers at http://127.0.0.1:9/v1\n"


def test_a_url_without_its_end(run, rules: RuleServer, images: Path) -> None:
    save_images(images, [0.5])
    rules.url = rules.url.removesuffix("/v1")
    assert "does the URL end in /v1?" in run(status=1)[1]


def test_a_folder_without_images_or_a_bad_state_file(run, images: Path, tmp_path: Path) -> None:
    images.mkdir()
    assert "has no images" in run(status=2)[1]
    save_images(images, [0.5])
    state = tmp_path / "notes.txt"
    state.write_text("notes\n")
    assert "notes.txt:1 is no line of a state file" in run("--state", str(state), status=2)[1]
    assert "No such file" in run("--state", str(tmp_path / "no" / "x"), status=2)[1]


def test_a_plot(run, images: Path, tmp_path: Path) -> None:
    save_images(images, [0.72, 0.99])
    run("--use", "read", "count", "--plot", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep", "99"], "'99' is no number between 0 and 1"),
        (["--ratios", "1"], "'1' is no fraction or decimal number from 0 to below 1"),
        (["--ratios", "1/0"], "'1/0' is no fraction"),
        (["--concurrency", "0"], "'0' is no number from 1 on"),
        (["--use", "read", "--question", "Q"], "give --use or --question"),
        (["--use", "sing"], "invalid choice: 'sing'"),
    ],
)
def test_wrong_arguments(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(["images", *flags])
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


def test_without_matplotlib_a_plot_is_refused_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vitcop_server.calibrate.command.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse_arguments(["images", "--plot", "x.png"])
    assert "pip install matplotlib" in capsys.readouterr().err
