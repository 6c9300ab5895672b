"""M-RoPE positions of prompts with images and videos."""

import torch

from vitcop_vllm.models.mrope import (
    MRoPEImage,
    adjacent_frames,
    mrope_positions,
    positions_beyond_tokens,
)


def test_an_unpruned_image_has_vllm_s_positions():
    positions, delta = mrope_positions(11, [MRoPEImage(2, 6, 2, 3, is_whole=True)])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7],
    ]
    assert delta == 8 - 11


def test_text_after_a_pruned_image_has_its_unpruned_positions():
    images = [MRoPEImage(2, 2, 2, 3, is_whole=False), MRoPEImage(5, 1, 4, 1, is_whole=False)]
    positions, delta = mrope_positions(8, images)
    #                                  text  image  t  image  text
    assert positions.tolist() == [[0, 1, 2, 2, 5, 6, 10, 11]] * 3
    assert delta == 12 - 8
    assert positions_beyond_tokens(images) == (3 - 2) + (4 - 1)


def test_a_prompt_may_end_with_its_image():
    positions, delta = mrope_positions(3, [MRoPEImage(1, 2, 5, 7, is_whole=False)])
    assert positions.tolist() == [[0, 1, 1]] * 3
    assert delta == 1 + 7 - 3


def test_text_positions_count_from_zero():
    positions, delta = mrope_positions(4, [])
    assert torch.equal(positions, torch.arange(4).expand(3, -1))
    assert delta == 0


def test_adjacent_frames_begin_at_one_position_and_differ_in_time():
    kept = [(1, 3), (4, 2), (6, 2)]  # offset and number of tokens of each frame
    images = [MRoPEImage(*tokens, 2, 3, is_whole=False) for tokens in kept]
    positions, delta = mrope_positions(9, adjacent_frames(images, [0, 2, 5]))
    #                                  t  first    frame frame text
    assert positions.tolist() == [[0, 1, 1, 1, 3, 3, 6, 6, 7], *[[0, *[1] * 7, 7]] * 2]
    assert delta == 8 - 9


def test_text_after_a_short_video_follows_its_frames_larger_side():
    images = [MRoPEImage(offset, 6, 2, 3, is_whole=True) for offset in (0, 6)]
    frames = adjacent_frames(images, [0, 1])
    positions, _ = mrope_positions(13, frames)
    assert positions.tolist() == [
        [0] * 6 + [1] * 6 + [3],
        [0, 0, 0, 1, 1, 1] * 2 + [3],
        [0, 1, 2] * 4 + [3],
    ]


def test_frames_with_text_between_them_are_images():
    frames = [MRoPEImage(1, 2, 2, 3, is_whole=False), MRoPEImage(5, 2, 2, 3, is_whole=False)]
    positions, _ = mrope_positions(8, frames)
    assert positions.tolist() == [[0, 1, 1, 4, 5, 6, 6, 9]] * 3
