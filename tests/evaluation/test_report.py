"""Cells from answers, and their tables."""

from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from evaluation.exam import Example, Turn
from evaluation.intervals import mean_score, paired_difference
from evaluation.report import Cell, tables
from evaluation.scoring import exact


def answer(text: str, ratio: float, stages: list[int]) -> ChatCompletion:
    usage: dict[str, Any] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    usage |= {"pruning_ratio": ratio, "visual_tokens": {"encoder": 100, "stages": stages}}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    fields = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    return ChatCompletion.model_validate({**fields, "choices": [choice], "usage": usage})


def test_a_cell_sums_up_its_answers():
    turn = Turn(question="Q", answers=("yes",))
    one, two = (
        Example(images=(Path("a.png"),), family=f"of {turns}", turns=(turn,) * turns)
        for turns in (1, 2)
    )
    right, wrong = answer("Yes.", 0.6, [80, 40]), answer("no", 0.4, [90, 60])
    made = Cell.of("m", "vitcop", "1/2", [one, two, one], [[right], [right, wrong], [wrong]], exact)
    assert made.scores == {"of 1": [1, 0], "of 2": [0.5]}
    assert made.pruned == pytest.approx(0.5)
    assert made.stages == [85, 50]


def cell(selector: str, ratio: str, **scores: list[float]) -> Cell:
    return Cell("m", selector, ratio, scores, 0.5, [288.04, 51])


UNPRUNED = cell("vitcop", "0", a=[1, 1, 1], b=[1, 0.5])
PRUNED = cell("vitcop", "1/2", a=[1, 0, 1], b=[1, 0.5])
CLS = cell("cls", "1/2", a=[0, 0, 0], b=[0, 0])


def per_cent(*figures: float) -> list[float]:
    return [round(100 * figure, 1) for figure in figures]


def test_each_selector_has_its_mean_over_families():
    answers = tables([UNPRUNED, PRUNED, CLS])["answers"]
    assert [row["selector"] for row in answers] == ["vitcop", "cls"]
    assert (answers[0]["0"], answers[0]["1/2"], answers[1]["1/2"]) == (87.5, 70.8, 0)
    low, high = answers[0]["1/2_spread"]
    assert 0 < low < 70.8 < high < 100


def test_each_family_has_its_row():
    families = tables([UNPRUNED, PRUNED])["families"]
    assert [row["family"] for row in families] == ["a", "b"]
    assert families[0]["1/2"] == 66.7
    assert families[0]["1/2_spread"] == per_cent(*mean_score([1, 0, 1])[1:])


def test_differences_are_paired_with_the_common_ratio_0():
    rows = tables([UNPRUNED, PRUNED, CLS])["less_ratio_0"]
    found = {(row["selector"], row["family"]): row for row in rows}
    expected = paired_difference([1, 0, 1], [1, 1, 1])
    assert found["vitcop", "a"]["1/2"] == -33.3
    assert found["vitcop", "a"]["1/2_spread"] == per_cent(*expected[1:])
    assert found["cls", "mean of families"]["1/2"] == -87.5
    assert not any("0" in row for row in rows)
    assert tables([PRUNED])["less_ratio_0"] == []


def test_tokens_have_a_row_for_each_cell():
    assert tables([UNPRUNED, CLS])["tokens"][1] == {
        "selector": "cls",
        "ratio": "1/2",
        "pruned": 0.5,
        "stages": [288.0, 51],
    }
