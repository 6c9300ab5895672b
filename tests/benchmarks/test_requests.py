"""The bench's requests."""

import pytest

from benchmarks.requests import filler_text, random_image, user_turn


@pytest.mark.parametrize("tokens", [1, 7, 2048])
def test_text_has_the_requested_length(tokens):
    assert len(filler_text(tokens)) == tokens
    assert "<" not in filler_text(tokens)


def test_a_turn_marks_its_images():
    assert user_turn("Why?", 3).count("<image>") == 3
    assert user_turn("Why?") == "USER: <image>\nWhy? ASSISTANT:"


def test_the_same_seed_gives_the_same_image():
    assert random_image(1, 20, 30).size == (20, 30)
    assert random_image(1).tobytes() == random_image(1).tobytes() != random_image(2).tobytes()
