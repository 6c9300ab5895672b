"""Things of a scene do not overlap, and the image shows each at its place."""

import numpy as np
import pytest
from numpy.random import default_rng

from demo.drawing import draw, patch_targets, sign_box
from demo.scenes import make_scene
from demo.world import ALPHABET, COLOURS, PATCH, SIDE, SQUARE, Scene, Thing


def test_the_odd_one_out_differs_from_the_others_and_the_others_are_equal():
    for i in range(40):
        scene = make_scene(default_rng((3, i)), kind="odd")
        assert scene.odd is not None
        others = {t.name for t in scene.things if t is not scene.odd}
        assert len(others) == 1
        assert scene.odd.name not in others


@pytest.mark.parametrize("size", [(168, 168), SQUARE, (448, 252)])
def test_things_do_not_overlap_and_lie_inside_the_image(size):
    for i in range(60):
        scene = make_scene(default_rng((4, i)), size)
        boxes = [
            (t.x - t.radius, t.y - t.radius, t.x + t.radius, t.y + t.radius) for t in scene.things
        ]
        if scene.sign is not None:
            boxes.append(sign_box(scene.sign))
        for j, (left, top, right, bottom) in enumerate(boxes):
            assert min(left, top) >= 0
            assert right <= size[0]
            assert bottom <= size[1]
            for a, b, c, d in boxes[:j]:
                assert right < a or left > c or bottom < b or top > d


def test_a_scene_is_drawn_as_described():
    things = (
        Thing("star", "red", "small", 50, 50, 20, 0),
        Thing("square", "blue", "big", 280, 60, 35, 10),
        Thing("ring", "white", "small", 170, 290, 20, 0),
    )
    image = np.asarray(draw(Scene(SQUARE, things, None, "plain", seed=1)), dtype=int)
    for thing in things:
        # A ring's centre is empty, so look at its band.
        x = thing.x + (0.7 * thing.radius if thing.shape == "ring" else 0)
        assert abs(image[int(thing.y), int(x)] - COLOURS[thing.colour]).max() <= 12
    assert image.shape == (SIDE, SIDE, 3)


def test_letter_targets_mark_patches_where_the_sign_is_drawn():
    for i in range(30):
        scene = make_scene(default_rng((5, i)), kind="sign")
        bare = Scene(scene.size, scene.things, None, scene.ground, scene.seed)
        changed = (np.asarray(draw(scene)) != np.asarray(draw(bare))).any(axis=2)
        grid = patch_targets(scene)["letter"] > 0
        assert scene.sign is not None
        for y, x in np.argwhere(grid):
            assert changed[PATCH * y : PATCH * (y + 1), PATCH * x : PATCH * (x + 1)].any()
        letters = {ALPHABET[c - 1] for c in np.unique(patch_targets(scene)["letter"]) if c}
        assert letters <= set(scene.sign.text)
