"""From answers to cells, figures, tables and merged documents."""

import json

import pytest

from evaluation.client import UNPRUNED, Outcome, Ratio, Reply
from evaluation.exam import Example, Turn
from evaluation.intervals import interval_of_mean, paired_difference, wilson
from evaluation.report import (
    UNPRUNED_NAME,
    Cell,
    Document,
    ReportError,
    accuracies,
    differences,
    merge,
    tables,
)

CONDITIONS = {"task": "demo", "exam": "e", "scorer": "exact", "model": "m", "max_tokens": 32}


def reply(score: float, seconds: float = 1.0, ratio: float | None = 0.5) -> Reply:
    known = ratio is not None
    return Reply("", score, seconds, ratio, 100 if known else None, (80, 40) if known else None)


def example(family: str, turns: int = 1) -> Example:
    return Example(family, (b"",), (Turn("Q", ("A",)),) * turns)


def cell(selector: str, ratio: str, **scores: list[list[float] | None]) -> Cell:
    return Cell(selector=selector, ratio=ratio, scores=scores)


def baseline(**scores: list[list[float] | None]) -> Cell:
    return cell(UNPRUNED_NAME, "0", **scores)


def test_cell_of_answers():
    made = Cell.of(
        "vitcop",
        Ratio.parse("1/2"),
        [example("a"), example("b", 2), example("a"), example("a")],
        [
            Outcome((reply(1, 1.0, 0.5),)),
            Outcome((reply(1, 2.0, 0.6), reply(0, 3.0, 0.4))),
            Outcome(error="broken"),
            Outcome((reply(0, 6.0, 0.9),)),
        ],
    )
    assert made.scores == {"a": [[1], None, [0]], "b": [[1, 0]]}
    assert made.errors == {"broken": 1}
    assert made.effective_ratio == pytest.approx(0.6)
    assert made.visual_tokens == pytest.approx(40)
    assert made.stages == [80, 40]
    assert (made.latency_s, made.latency_p50_s) == (3.0, 2.5)


def test_cell_of_a_server_that_reports_nothing():
    made = Cell.of("m", Ratio.parse("none"), [example("a")], [Outcome((reply(1, ratio=None),))])
    assert (made.effective_ratio, made.visual_tokens, made.stages) == (None, None, None)
    assert "none" in tables(Document(conditions={}, results=[made]))


def test_cell_without_an_answer():
    made = Cell.of("m", UNPRUNED, [example("a")] * 2, [Outcome(error="x"), Outcome(error="y")])
    assert made.scores == {"a": [None, None]}
    assert accuracies(made) == {}
    assert made.latency_s is None


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
    # Families weigh the same, however many examples each has.
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


def test_document_survives_writing(tmp_path):
    document = Document(
        conditions=CONDITIONS,
        results=[baseline(a=[[1], None]), cell("cls", "1/2", a=[[0], [1, 0.5]])],
    )
    file = tmp_path / "out.json"
    document.write(file)
    assert list(tmp_path.iterdir()) == [file]
    assert Document.read(file) == document
    told = json.loads(file.read_text())
    assert "difference" not in told["results"][0]
    assert told["results"][1]["accuracy"]["a"]["correct"] == 0.75
    assert told["results"][1]["difference"]["a"]["difference"] == -1
    file.write_text("{}")
    with pytest.raises(ReportError, match=r"out\.json: not a document"):
        Document.read(file)
    with pytest.raises(ReportError, match="not a document"):
        Document.read(tmp_path / "missing.json")


def write(path, *cells: Cell, **conditions: object):
    Document(conditions={**CONDITIONS, **conditions}, results=list(cells)).write(path)
    return path


def test_merge_pairs_across_files(tmp_path):
    one = write(tmp_path / "1.json", baseline(a=[[1], [1]]), cell("vitcop", "1/2", a=[[1], [0]]))
    two = write(tmp_path / "2.json", cell("cls", "1/2", a=[[0], [0]]), vllm="0.33")
    merged, notes = merge([one, two])
    assert notes == []
    assert {name: [c.ratio for c in cells] for name, cells in merged.selectors.items()} == {
        "vitcop": ["0", "1/2"],
        "cls": ["0", "1/2"],
    }
    cls = merged.summary()["results"][2]
    assert cls["difference"]["mean"]["difference"] == -1
    assert merged.conditions == CONDITIONS


def test_merge_tells_apart(tmp_path):
    one = write(tmp_path / "1.json", baseline(a=[[1]]), cell("vitcop", "1/2", a=[[1]]))
    other_exam = write(tmp_path / "2.json", cell("cls", "1/2", a=[[1]]), exam="f")
    with pytest.raises(ReportError, match=r"2\.json has exam 'f', but .*1\.json has 'e'"):
        merge([one, other_exam])
    again = write(tmp_path / "3.json", cell("vitcop", "1/2", a=[[1]]))
    with pytest.raises(ReportError, match=r"3\.json has vitcop at 1/2"):
        merge([one, again])
    same = write(tmp_path / "4.json", baseline(a=[[1]]))
    assert merge([one, same])[1] == []
    differs = write(tmp_path / "5.json", baseline(a=[[0]]))
    merged, notes = merge([one, differs])
    assert len(notes) == 1
    assert merged.baseline == baseline(a=[[1]])


def test_conditions_that_may_differ_are_all_kept(tmp_path):
    one = write(tmp_path / "1.json", cell("vitcop", "1/2", a=[[1]]), concurrency=8)
    two = write(tmp_path / "2.json", cell("cls", "1/2", a=[[1]]), concurrency=1)
    assert merge([one, two])[0].conditions["concurrency"] == [8, 1]


def test_tables():
    refused = Cell(selector="fastv", ratio="17/18", refusal="must be at most 0.9375")
    failed = cell("fastv", "8/9", a=[[1], None], b=[[1], [0]])
    failed.errors = {"timed out": 3}
    pruned = cell("fastv", "2/3", a=[[1], [0]], b=[[1], [1]])
    pruned.effective_ratio, pruned.visual_tokens, pruned.stages = 0.667, 191.8, [288.0, 253.0, 51.0]
    first = baseline(a=[[1], [1]], b=[[1], [1]])
    document = Document(conditions={}, results=[refused, first, failed, pruned])
    lines = tables(document).splitlines()
    assert lines[0].split() == ["fastv", "0", "2/3", "8/9!", "17/18"]
    assert "50.0 [9, 91]" in lines[1]
    assert lines[1].endswith("-")
    assert lines[3].startswith("mean")
    assert lines[4].startswith("less ratio 0")
    assert "-50.0 [" in lines[5]
    assert any("288/253/51" in line for line in lines)
    assert lines[-2:] == ["- must be at most 0.9375", "! 3 x timed out"]
    assert document.failures == {"timed out": 3}
