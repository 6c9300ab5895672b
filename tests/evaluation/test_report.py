"""Cells, accuracies, tables and documents."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from evaluation.client import UNPRUNED, Ratio, Reply, Usage
from evaluation.exam import Example, Turn
from evaluation.intervals import interval_of_mean, paired_difference, wilson
from evaluation.report import (
    UNPRUNED_NAME,
    Cell,
    Document,
    ReportError,
    accuracies,
    differences,
    tables,
)


def reply(is_right: bool, ratio: float | None = 0.5) -> Reply:
    return Reply("", is_right, None if ratio is None else Usage(ratio, 100, (80, 40)))


def example(family: str, turns: int = 1) -> Example:
    turn = Turn(question="Q", answers=("A",))
    return Example(images=(Path("a.png"),), family=family, turns=(turn,) * turns)


def printed(document: Document) -> list[str]:
    console = Console(width=1000, markup=False)
    with console.capture() as capture:
        for part in tables(document):
            console.print(part)
    return [line.strip() for line in capture.get().splitlines() if line.strip(" ─")]


def cell(selector: str, ratio: str, **scores: list[list[float] | None]) -> Cell:
    return Cell(selector=selector, ratio=ratio, scores=scores)


def baseline(**scores: list[list[float] | None]) -> Cell:
    return cell(UNPRUNED_NAME, "0", **scores)


def test_a_cell_sums_up_its_answers():
    made = Cell.of(
        "vitcop",
        Ratio.parse("1/2"),
        [example("a"), example("b", 2), example("a"), example("a")],
        [
            [reply(True, 0.5)],
            [reply(True, 0.6), reply(False, 0.4)],
            "broken",
            [reply(False, 0.9)],
        ],
    )
    assert made.scores == {"a": [[1], None, [0]], "b": [[1, 0]]}
    assert made.errors == {"broken": 1}
    assert made.effective_ratio == pytest.approx(0.6)
    assert made.visual_tokens == pytest.approx(40)
    assert made.stages == [80, 40]


def test_a_cell_without_usage_has_no_ratio():
    made = Cell.of("m", Ratio.parse("none"), [example("a")], [[reply(True, ratio=None)]])
    assert (made.effective_ratio, made.visual_tokens, made.stages) == (None, None, None)
    assert printed(Document(results=[made]))[-1].split() == ["in", "each", "stage", "-"]


def test_a_cell_without_answers_has_no_accuracy():
    made = Cell.of("m", UNPRUNED, [example("a")] * 2, ["x", "y"])
    assert made.scores == {"a": [None, None]}
    assert accuracies(made) == {}


def test_accuracies_count_examples_not_turns():
    figures = accuracies(cell("s", "1/2", a=[[1], [1], [0], None], b=[[1, 0], [1, 1]]))
    assert figures["a"] == {
        "correct": 2,
        "total": 3,
        "accuracy": pytest.approx(2 / 3),
        "interval": wilson(2 / 3, 3),
    }
    assert figures["b"]["correct"] == 1.5
    assert figures["b"]["interval"] == wilson(0.75, 2)
    # All families have the same weight.
    assert figures["mean"]["accuracy"] == pytest.approx((2 / 3 + 0.75) / 2)
    assert figures["mean"]["interval"] == interval_of_mean(
        [2 / 3, 0.75], [wilson(2 / 3, 3), wilson(0.75, 2)]
    )


def test_no_mean_without_every_family():
    assert list(accuracies(cell("s", "1/2", a=[[1]], b=[None]))) == ["a"]


def test_differences_are_paired():
    pruned = cell("s", "1/2", a=[[1], [0], [0], None, [1, 0]])
    figures = differences(pruned, baseline(a=[[0], [1], None, [1], [1, 1]]))
    assert figures["a"]["difference"] == pytest.approx((1 - 1 - 0.5) / 3)
    assert figures["a"]["interval"] == paired_difference([1, 0, 0.5], [0, 1, 1])
    assert figures["mean"] == figures["a"]


def test_a_document_reads_back_unchanged(tmp_path):
    document = Document(
        conditions={"exam": "e"},
        results=[baseline(a=[[1], None]), cell("cls", "1/2", a=[[0], [1, 0.5]])],
    )
    file = tmp_path / "out.json"
    document.write(file)
    assert list(tmp_path.iterdir()) == [file]
    assert Document.read(file) == document
    written = json.loads(file.read_text())
    assert "difference" not in written["results"][0]
    assert written["results"][1]["accuracy"]["a"]["correct"] == 0.75
    assert written["results"][1]["difference"]["a"]["difference"] == -1
    file.write_text("[]")
    with pytest.raises(ReportError, match=r"out\.json: not a document"):
        Document.read(file)
    with pytest.raises(ReportError, match="not a document"):
        Document.read(tmp_path / "missing.json")


def test_cells_with_errors_are_measured_again(tmp_path):
    good, failed = cell("cls", "1/2", a=[[1]]), cell("cls", "2/3", a=[None])
    failed.errors = {"timed out": 1}
    Document(results=[good, failed]).write(tmp_path / "a.json")
    assert Document.read(tmp_path / "a.json").results == [good]


def test_a_run_continues_only_under_the_same_conditions():
    document = Document(conditions={"exam": "e"})
    document.add_conditions(exam="e", model="m")
    assert document.conditions == {"exam": "e", "model": "m"}
    with pytest.raises(ReportError, match="had model 'm', this one has 'n'"):
        document.add_conditions(model="n")


def test_each_selector_is_compared_with_the_common_baseline():
    results = [baseline(a=[[1]]), cell("vitcop", "1/2", a=[[1]]), cell("cls", "1/2", a=[[0]])]
    document = Document(results=results)
    assert {name: [c.ratio for c in cells] for name, cells in document.selectors.items()} == {
        "vitcop": ["0", "1/2"],
        "cls": ["0", "1/2"],
    }
    assert document.summary()["results"][2]["difference"]["mean"]["difference"] == -1


def test_tables_show_refusals_and_errors():
    refused = Cell(selector="fastv", ratio="17/18", refusal="must be at most 0.9375")
    failed = cell("fastv", "8/9", a=[[1], None], b=[[1], [0]])
    failed.errors = {"timed out": 3}
    pruned = cell("fastv", "2/3", a=[[1], [0]], b=[[1], [1]])
    pruned.effective_ratio, pruned.visual_tokens, pruned.stages = 0.667, 191.8, [288.0, 253.0, 51.0]
    first = baseline(a=[[1], [1]], b=[[1], [1]])
    document = Document(results=[refused, first, failed, pruned])
    lines = printed(document)
    assert lines[0].split() == ["fastv", "0", "2/3", "8/9!", "17/18"]
    assert lines[1] == "accuracy / %"
    assert "50.0 [9, 91]" in lines[2]
    assert lines[2].endswith("-")
    assert lines[4].startswith("mean")
    assert lines[5] == "less ratio 0"
    assert "-50.0 [" in lines[6]
    assert any("288/253/51" in line for line in lines)
    assert lines[-2:] == ["- must be at most 0.9375", "! 3 x timed out"]
    assert document.failures == {"timed out": 3}
