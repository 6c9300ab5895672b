"""The small world: what is asked has one right answer, and the picture shows it."""

import numpy as np
import pytest
from PIL import Image

from vitcop_vllm.demo import scenes
from vitcop_vllm.demo.scenes import COLOURS, FAMILIES, SIDE, Scene, Thing


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def thing(shape: str, colour: str, x: float, y: float, size: str = "small") -> Thing:
    return Thing(shape, colour, size, x, y, 20.0, 0.0)


def asked(family: str, scene: Scene, tries: int = 60) -> dict[str, str]:
    """Every question of a family that some wording and choice leads to, with its answer."""
    found: dict[str, str] = {}
    for i in range(tries):
        turn = scenes.SINGLE[family](scene, rng(i))
        if turn is not None:
            assert found.setdefault(turn.question, turn.answer) == turn.answer
    return found


SCENE = Scene(
    SIDE,
    (
        thing("star", "red", 50, 50),
        thing("star", "blue", 280, 60, "big"),
        thing("ring", "blue", 170, 290),
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
        ("count", "How many objects are there?", "3"),
        ("existence", "Is there a red star?", "yes"),
        ("relation", "Is the red star left of the blue star?", "yes"),
        ("relation", "Is the red star below the blue ring?", "no"),
        ("text", "Read the text.", "nothing"),
        (
            "description",
            "Describe the picture.",
            "small red star, small blue ring, big blue star",
        ),
    ],
)
def test_answers_follow_from_the_scene(family, question, answer):
    assert asked(family, SCENE, 400)[question] == answer


def test_nothing_ambiguous_is_asked():
    assert not any(
        "star?" in question and "the star" in question for question in asked("colour", SCENE)
    )
    assert not any("blue" in question for question in asked("shape", SCENE))
    assert not any(
        "red star above the blue star" in question for question in asked("relation", SCENE)
    )


def test_the_odd_one_out_differs_from_all_others_and_they_from_none():
    for i in range(40):
        scene = scenes.make_scene(rng(3, i), kind="odd")
        assert scene.odd is not None
        others = {t.name for t in scene.things if t is not scene.odd}
        assert len(others) == 1
        assert scene.odd.name not in others


@pytest.mark.parametrize("side", [168, SIDE])
def test_things_stand_apart_and_inside(side):
    for i in range(60):
        scene = scenes.make_scene(rng(4, i), side)
        boxes = [
            (t.x - t.radius, t.y - t.radius, t.x + t.radius, t.y + t.radius) for t in scene.things
        ]
        if scene.sign is not None:
            boxes.append(scenes._sign_box(scene.sign))
        for j, (left, top, right, bottom) in enumerate(boxes):
            assert min(left, top) >= 0
            assert max(right, bottom) <= side
            for a, b, c, d in boxes[:j]:
                assert right < a or left > c or bottom < b or top > d


def test_a_scene_is_drawn_as_described():
    picture = np.asarray(scenes.draw(SCENE), dtype=int)
    for one in SCENE.things:
        # A ring shows its colour off its centre.
        x = one.x + (0.7 * one.radius if one.shape == "ring" else 0)
        assert abs(picture[int(one.y), int(x)] - COLOURS[one.colour]).max() <= 12
    assert picture.shape == (SIDE, SIDE, 3)


def test_every_sign_is_drawn_where_its_letters_are_said_to_be():
    for i in range(30):
        scene = scenes.make_scene(rng(5, i), kind="sign")
        bare = Scene(scene.side, scene.things, None, scene.ground, scene.seed)
        changed = (np.asarray(scenes.draw(scene)) != np.asarray(scenes.draw(bare))).any(axis=2)
        grid = scenes.patch_targets(scene)["letter"] > 0
        assert scene.sign is not None
        for y, x in np.argwhere(grid):
            assert changed[14 * y : 14 * y + 14, 14 * x : 14 * x + 14].any()
        letters = {
            scenes.ALPHABET[c - 1] for c in np.unique(scenes.patch_targets(scene)["letter"]) if c
        }
        assert letters <= set(scene.sign.text)


def test_an_exam_is_fixed_by_its_seed_and_asks_every_family():
    first, again, other = scenes.exam(2), scenes.exam(2), scenes.exam(2, seed=1)
    assert [example.family for example in first] == [f for f in FAMILIES for _ in range(2)]
    assert [e.turns for e in first] == [e.turns for e in again]
    assert [e.turns for e in first] != [e.turns for e in other]
    for one, two in zip(first, again, strict=True):
        for a, b in zip(one.pictures, two.pictures, strict=True):
            assert isinstance(a, Image.Image)
            assert a.size == (SIDE, SIDE)
            assert np.array_equal(np.asarray(a), np.asarray(b))
    assert all(len(e.turns) == 2 for e in first if e.family == "dialogue")
    assert all(len(e.pictures) == 2 for e in first if e.family == "two pictures")


def test_yes_and_no_are_about_as_frequent():
    for family in ("existence", "relation"):
        answers = [scenes.compose(family, rng(6, i))[1][0].answer for i in range(200)]
        assert 0.35 < answers.count("yes") / len(answers) < 0.65
