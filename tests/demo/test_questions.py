"""Every question about a scene has one right answer."""

from collections import Counter

import numpy as np
import pytest
from numpy.random import default_rng
from PIL import Image

from demo.questions import EXAMINED, SINGLE, compose, exam
from demo.world import SIDE, SQUARE, Scene, Thing


def thing(shape: str, colour: str, x: float, y: float, size: str = "small") -> Thing:
    return Thing(shape, colour, size, x, y, 20.0, 0.0)


def questions_about(scene: Scene, family: str, tries: int = 60) -> dict[str, str]:
    """Question -> answer, for the questions of a family from several seeds."""
    found: dict[str, str] = {}
    for i in range(tries):
        turn = SINGLE[family](scene, default_rng(i))
        if turn is not None:
            assert found.setdefault(turn.question, turn.answer) == turn.answer
    return found


SCENE = Scene(
    SQUARE,
    (
        thing("star", "red", 50, 50),
        thing("star", "blue", 280, 60, "big"),
        thing("ring", "blue", 170, 290),
        thing("cross", "green", 90, 170),
    ),
    sign=None,
    ground="plain",
    seed=1,
)


@pytest.mark.parametrize(
    ("family", "question", "answer"),
    [
        ("colour", "What colour is the ring?", "blue"),
        ("shape", "What shape is the red object?", "star"),
        ("size", "How big is the blue star?", "big"),
        ("position", "Where is the red star?", "top left"),
        ("position", "Where is the ring?", "bottom centre"),
        ("count", "How many stars are there?", "2"),
        ("count", "How many blue objects are there?", "2"),
        ("count", "How many objects are there?", "4"),
        ("existence", "Is there a red star?", "yes"),
        ("existence", "Can you see a green object?", "yes"),
        ("existence", "Can you see a green star?", "no"),
        ("relation", "Is the cross left or right of the ring?", "left"),
        ("relation", "Is the ring above or below the cross?", "below"),
        ("text", "Read the text.", "nothing"),
        (
            "description",
            "Describe the picture.",
            "small red star, small green cross, small blue ring, big blue star",
        ),
    ],
)
def test_answers_follow_from_the_scene(family, question, answer):
    assert questions_about(SCENE, family, 400)[question] == answer


def test_no_question_is_ambiguous():
    """The scene has two stars and two blue things."""
    assert not any(
        "star?" in question and "the star" in question
        for question in questions_about(SCENE, "colour")
    )
    assert not any("blue" in question for question in questions_about(SCENE, "shape"))
    assert not any("star" in question for question in questions_about(SCENE, "relation"))


def test_a_seed_fixes_an_exam_and_every_examined_family_occurs():
    first, again, other = exam(2), exam(2), exam(2, seed=1)
    assert [example.family for example in first] == [f for f in EXAMINED for _ in range(2)]
    assert [e.turns for e in first] == [e.turns for e in again]
    assert [e.turns for e in first] != [e.turns for e in other]
    for one, two in zip(first, again, strict=True):
        for a, b in zip(one.images, two.images, strict=True):
            assert isinstance(a, Image.Image)
            assert a.size == (SIDE, SIDE)
            assert np.array_equal(np.asarray(a), np.asarray(b))
    assert all(len(e.turns) == 2 for e in first if e.family == "dialogue")
    assert all(len(e.images) == 2 for e in first if e.family == "two pictures")


def test_a_family_alone_has_the_conversations_of_the_whole_exam():
    whole = [example.turns for example in exam(2, seed=3) if example.family in ("text", "count")]
    some = [example.turns for example in exam(2, seed=3, families=("count", "text"))]
    assert some == whole


@pytest.mark.parametrize(
    ("family", "answers"),
    [("existence", {"yes", "no"}), ("relation", {"left", "right", "above", "below"})],
)
def test_all_answers_are_about_equally_frequent(family, answers):
    counts = Counter(compose(family, default_rng((6, i)))[1][0].answer for i in range(200))
    assert set(counts) == answers
    fair = 200 / len(answers)
    assert all(0.65 * fair < count < 1.35 * fair for count in counts.values())
