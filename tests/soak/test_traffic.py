"""The traffic of a soak is repeatable, and has what it should have."""

import pytest

from tests.checkpoints.tiny import QWEN
from tests.families.family import image_size
from tests.soak.test_soak import LOADS, compare_tokens
from tests.soak.traffic import Traffic


def test_a_seed_can_be_repeated():
    one, again, other = (Traffic(seed, range(12)) for seed in (3, 3, 4))
    specs = [one.next() for _ in range(50)]
    assert [again.next() for _ in range(50)] == specs
    assert [other.next() for _ in range(50)] != specs


def test_images_of_many_sizes_come_in_a_model_that_takes_them():
    load = LOADS["qwen2.5-vl"]
    traffic = Traffic(0, load.images)
    images = {image for _ in range(200) for image in traffic.next().images}
    assert images == set(load.images)
    grids = {QWEN.grid(*image_size(image)) for image in images}
    assert len(grids) == len(images) - 1, "the two smallest are scaled up to the same"
    tokens = {rows * columns for rows, columns in grids}
    assert min(tokens) == QWEN.min_visual_tokens
    assert QWEN.max_visual_tokens - 40 < max(tokens) <= load.max_visual_tokens
    assert min(rows for rows, _ in grids) == min(columns for _, columns in grids) == 1


def test_videos_come_alone_and_beside_an_image():
    load = LOADS["qwen2.5-vl"]
    traffic = Traffic(0, load.images, load.videos)
    specs = [traffic.next() for _ in range(200)]
    assert {video for spec in specs for video in spec.videos} == set(load.videos)
    assert {spec.order for spec in specs} == {"", "v", "iv", "vi"}
    assert all(spec.ratio is not None for spec in specs if spec.videos)


@pytest.mark.parametrize("videos", [(), (1, 2)])
def test_conversations_go_on(videos):
    traffic = Traffic(0, range(12), videos)
    first = traffic.next()
    traffic.finished(first, " it is a cat")
    later = [traffic.next() for _ in range(30)]
    follow_ups = [
        spec for spec in later if f"{first.text} ASSISTANT: it is a cat USER: " in spec.text
    ]
    assert follow_ups
    for spec in follow_ups:
        assert (spec.images, spec.videos) == (first.images, first.videos)
        assert (spec.ratio, spec.system) == (first.ratio, first.system)


@pytest.mark.parametrize(
    ("tokens", "difference"),
    [([1, 2, 3], None), ([1, 2], None), ([1, 9, 9], "tie"), ([1, 2, 9], "wrong")],
)
def test_answers_may_differ_only_where_tokens_are_equally_likely(tokens, difference):
    logprobs = [{1: -0.1, 5: -3.0}, {2: -0.7, 9: -0.7000001}, {3: -0.1, 9: -3.0}]
    assert compare_tokens(tokens, [1, 2, 3], logprobs) == difference
