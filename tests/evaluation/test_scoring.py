"""What counts as right."""

import pytest

from evaluation.exam import ExamError, Example, Turn
from evaluation.scoring import check_answers, contains, exact, vqa


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("red", ["red"], 1),
        (" Red.\n", ["red"], 1),
        ('"RED"!', ["red"], 1),
        ("**red**", ["red"], 1),
        ("STRASSE", ["straße"], 1),
        ("grey", ["gray", "grey"], 1),
        ("dark red", ["red"], 0),
        ("redder", ["red"], 0),
        ("", ["red"], 0),
        # Signs are part of a number.
        ("-5", ["5"], 0),
        ("5", [".5"], 0),
        ("5.", ["5"], 1),
    ],
)
def test_exact(answer, accepted, score):
    assert exact(answer, accepted) == score


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("It is a Red car.", ["red"], 1),
        ("It is a red.", ["blue", "Red."], 1),
        ("It is rendered.", ["red"], 0),
        ("about 15", ["5"], 0),
        ("C++ it is", ["c++"], 1),
        ("", ["red"], 0),
    ],
)
def test_contains(answer, accepted, score):
    assert contains(answer, accepted) == score


def test_vqa():
    ten = ["red"] * 2 + ["dark red"] * 5 + ["maroon"] * 3
    assert vqa("Red.", ten) == pytest.approx(2 / 3)
    assert vqa("dark red", ten) == 1
    assert vqa("maroon", ten) == 1
    assert vqa("blue", ten) == 0


def test_exams_that_cannot_be_scored():
    def exam(*answers: str) -> list[Example]:
        return [Example("a", (b"",), (Turn("Really?", answers),))]

    check_answers(exam("yes"), "exact")
    check_answers(exam("yes", "yes", "no"), "vqa")
    with pytest.raises(ExamError, match=r"three answers.*'Really\?' has 1"):
        check_answers(exam("yes"), "vqa")
    # It would be found in any answer.
    with pytest.raises(ExamError, match="without any word"):
        check_answers(exam("yes", "..."), "contains")
