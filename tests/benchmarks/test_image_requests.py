"""Requests that the bench sends."""

import pytest

from benchmarks.image_requests import random_image, text_of, user_turn


@pytest.mark.parametrize("tokens", [1, 7, 2048])
def test_text_has_the_wanted_number_of_tokens(tokens):
    assert len(text_of(tokens)) == tokens
    assert "<" not in text_of(tokens)


def test_a_turn_has_one_placeholder_per_image():
    assert user_turn("Why?", 3).count("<image>") == 3
    assert user_turn("Why?") == "USER: <image>\nWhy? ASSISTANT:"


def test_equal_seeds_make_equal_images():
    assert random_image(1, 20, 30).size == (20, 30)
    assert random_image(1).tobytes() == random_image(1).tobytes() != random_image(2).tobytes()
