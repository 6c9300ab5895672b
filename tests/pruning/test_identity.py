"""An image's identifier holds the counts of its plan."""

from types import SimpleNamespace

import pytest

from vitcop_vllm.pruning.identity import (
    CountsMismatchError,
    counts_by_frame,
    counts_of_identifier,
    frames_of_identifier,
    plan_request,
    tag_identifier,
)
from vitcop_vllm.pruning.plan import VisualTokenCounts

COUNTS = VisualTokenCounts(576, 20, (172, 77, 15))


def feature(identifier: str, offset: int, *lengths: int):
    """An image whose runs of visual tokens have these lengths, with one text token between."""
    runs = []
    for length in lengths or (172,):
        runs.append((offset, offset + length - 1))
        offset += length + 1
    return SimpleNamespace(
        identifier=identifier, mm_position=SimpleNamespace(extract_embeds_range=lambda: runs)
    )


def test_an_identifier_returns_its_counts():
    assert counts_of_identifier(tag_identifier("f00d", COUNTS)) == COUNTS


def test_a_lora_prefix_does_not_change_the_counts():
    assert counts_of_identifier("adapter:" + tag_identifier("f00d", COUNTS)) == COUNTS


def test_counts_in_a_client_s_identifier_are_ignored():
    forged = tag_identifier("f00d@576.1.1.1.1", COUNTS)
    assert counts_of_identifier(forged) == COUNTS


def test_equal_images_with_different_counts_have_different_identifiers():
    other = VisualTokenCounts.unpruned(576)
    assert tag_identifier("f00d", COUNTS) != tag_identifier("f00d", other)


def test_a_request_without_pruned_images_has_no_plan():
    assert plan_request([]) is None
    whole = tag_identifier("f00d", VisualTokenCounts.unpruned(172))
    assert plan_request([feature(whole, 3)]) is None


def test_a_plan_s_spans_are_the_placeholders_positions():
    plan = plan_request([feature(tag_identifier("a", COUNTS), 3)])
    assert plan is not None
    assert [(span.offset, span.end) for span in plan.spans] == [(3, 175)]


@pytest.mark.parametrize(
    "name", ["f00d", "me@example.org", "f00d@1.2.3", "f00d@1.2.3.4.x", "1.1.1.1.1"]
)
def test_an_identifier_without_counts_is_an_unpruned_image(name):
    assert plan_request([feature(name, 3)]) is None
    plan = plan_request([feature(name, 3), feature(tag_identifier("a", COUNTS), 200)])
    assert plan is not None
    assert plan.spans[0].counts == VisualTokenCounts.unpruned(172)


@pytest.mark.parametrize("length", [1, 171, 173, 576])
def test_counts_that_contradict_the_prompt_are_an_error(length):
    good = feature(tag_identifier("a", COUNTS), 3)
    with pytest.raises(CountsMismatchError, match=f"172 visual tokens.* {length} placeholders"):
        plan_request([good, feature(tag_identifier("b", COUNTS), 200, length)])


def test_unpruned_counts_that_contradict_the_prompt_are_an_error():
    whole = tag_identifier("a", VisualTokenCounts.unpruned(576))
    with pytest.raises(CountsMismatchError):
        plan_request([feature(whole, 3)])


def test_text_between_the_visual_tokens_of_a_pruned_image_is_an_error():
    pruned = tag_identifier("a", COUNTS)
    with pytest.raises(CountsMismatchError, match="text between"):
        plan_request([feature(pruned, 3, 86, 86)])


def test_text_may_stand_between_the_visual_tokens_of_an_unpruned_image():
    whole = tag_identifier("f00d", VisualTokenCounts.unpruned(9))
    plan = plan_request([feature(whole, 3, 4, 5), feature(tag_identifier("a", COUNTS), 200)])
    assert plan is not None
    assert (plan.spans[0].offset, plan.spans[0].end) == (3, 13)
    with pytest.raises(CountsMismatchError, match="10 placeholders"):
        plan_request([feature(whole, 3, 4, 6)])


def test_text_may_stand_between_the_visual_tokens_of_an_image_without_counts():
    plan = plan_request([feature("f00d", 3, 4, 5), feature(tag_identifier("a", COUNTS), 200)])
    assert plan is not None
    assert [(span.offset, span.end) for span in plan.spans] == [(3, 13), (200, 372)]


def test_impossible_counts_are_an_error():
    with pytest.raises(CountsMismatchError, match="impossible"):
        plan_request([feature("f00d@5.1.9.9.9", 3, 9)])


def test_an_error_shortens_a_long_identifier():
    with pytest.raises(CountsMismatchError) as caught:
        plan_request([feature("x" * 5000 + "@" + "9" * 5000 + ".1.1.1.1", 3)])
    assert len(str(caught.value)) < 300


def test_reading_counts_from_an_identifier_without_them_is_an_error():
    with pytest.raises(RuntimeError, match="without visual token counts"):
        counts_of_identifier("f00d")


def test_a_video_s_identifier_returns_the_counts_of_a_frame_and_the_number_of_frames():
    video = tag_identifier("f00d", COUNTS, 8)
    assert counts_of_identifier(video) == COUNTS
    assert frames_of_identifier(video) == 8
    assert frames_of_identifier(tag_identifier("f00d", COUNTS)) is None
    assert frames_of_identifier("f00d") is None
    # A video of one frame is no image.
    assert frames_of_identifier(tag_identifier("f00d", COUNTS, 1)) == 1


@pytest.mark.parametrize(
    ("lengths", "offsets"),
    [
        ((3 * 172,), [5, 177, 349]),
        ((172, 172, 172), [5, 178, 351]),
        ((2 * 172, 172), [5, 177, 350]),
    ],
)
def test_a_plan_has_a_span_for_each_frame(lengths, offsets):
    video = feature(tag_identifier("a", COUNTS, 3), 5, *lengths)
    image = feature(tag_identifier("b", COUNTS), 700)
    plan = plan_request([video, image])
    assert plan is not None
    assert [span.offset for span in plan.spans] == [*offsets, 700]
    assert {span.counts for span in plan.spans} == {COUNTS}
    assert [span.item for span in plan.spans] == [(3 * 576, 3 * 172)] * 3 + [(576, 172)]
    assert plan.patches_per_placeholder == (3 * 576, 3 * 172)
    assert plan.largest_item == 3 * 172


@pytest.mark.parametrize("lengths", [(172,), (4 * 172,), (171, 173, 172), (3 * 172 + 1,)])
def test_frames_that_contradict_the_prompt_are_an_error(lengths):
    with pytest.raises(CountsMismatchError, match=r"172 visual tokens.* of each of 3 frames"):
        plan_request([feature(tag_identifier("a", COUNTS, 3), 5, *lengths)])


ENDED = tag_identifier("a", COUNTS, 3, tail=1)


def test_tokens_after_the_last_frame_are_a_span_that_is_not_pruned():
    assert counts_by_frame(ENDED) == [COUNTS] * 3
    assert frames_of_identifier(ENDED) == 3
    plan = plan_request([feature(ENDED, 5, 3 * 172 + 1)])
    assert plan is not None
    assert [span.offset for span in plan.spans] == [5, 177, 349, 521]
    assert [span.counts for span in plan.spans] == [*[COUNTS] * 3, VisualTokenCounts.unpruned(1)]
    assert [plan.next_span_end(end) for end in (349, 521, 522)] == [521, 522, None]
    assert plan.dropped_tokens(521) == plan.dropped_tokens(522) == (0, 3 * 95, 3 * 157)
    # The encoder computes them with the video.
    assert plan.patches_per_placeholder == (3 * 576 + 1, 3 * 172 + 1)
    assert plan.largest_item == 3 * 172 + 1


def test_the_first_frame_s_counts_and_tokens_after_the_last_go_together():
    identifier = tag_identifier("a", COUNTS, 3, FIRST, 1)
    assert identifier == f"a@{FIRST.encode()}+{COUNTS.encode()}x2+1"
    plan = plan_request([feature(identifier, 5, 288 + 2 * 172 + 1)])
    assert plan is not None
    assert [span.offset for span in plan.spans] == [5, 293, 465, 637]
    assert [span.counts for span in plan.spans[:3]] == [FIRST, COUNTS, COUNTS]


@pytest.mark.parametrize("lengths", [(3 * 172,), (3 * 172 + 2,), (172 + 1, 2 * 172), (1, 3 * 172)])
def test_tokens_at_another_place_than_after_the_last_frame_are_an_error(lengths):
    with pytest.raises(CountsMismatchError, match="3 frames and 1 after them"):
        plan_request([feature(ENDED, 5, *lengths)])


def test_a_video_without_frames_is_an_error():
    with pytest.raises(CountsMismatchError):
        plan_request([feature("a@576.20.172.77.15x0", 5, 172)])


FIRST = VisualTokenCounts(576, 51, (288, 253, 51))
OTHERS = tag_identifier("a", COUNTS, 3, FIRST)


def test_the_first_frame_of_a_video_may_have_other_counts():
    assert counts_by_frame(OTHERS) == [FIRST, COUNTS, COUNTS]
    assert frames_of_identifier(OTHERS) == 3
    assert counts_by_frame(tag_identifier("a", COUNTS, 3)) == [COUNTS] * 3
    assert counts_by_frame(tag_identifier("a", COUNTS)) == [COUNTS]
    alone = tag_identifier("a", COUNTS, 1, FIRST)
    assert counts_by_frame(alone) == [FIRST]
    assert frames_of_identifier(alone) == 1


@pytest.mark.parametrize(
    ("lengths", "offsets"),
    [
        ((288 + 2 * 172,), [5, 293, 465]),
        ((288, 172, 172), [5, 294, 467]),
        ((288 + 172, 172), [5, 293, 466]),
    ],
)
def test_a_plan_has_a_span_for_each_frame_by_its_own_counts(lengths, offsets):
    plan = plan_request([feature(OTHERS, 5, *lengths)])
    assert plan is not None
    assert [span.offset for span in plan.spans] == offsets
    assert [span.counts for span in plan.spans] == [FIRST, COUNTS, COUNTS]
    assert plan.patches_per_placeholder == (3 * 576, 288 + 2 * 172)
    assert plan.largest_item == 288 + 2 * 172
    last = offsets[-1] + 172
    assert plan.dropped_tokens(last) == (0, 35 + 2 * 95, 237 + 2 * 157)
    assert plan.dropped_tokens(last - 1) == (0, 35 + 95, 237 + 157)


def test_the_most_pruned_item_is_a_whole_video():
    """Not its most pruned frame."""
    image = tag_identifier("b", VisualTokenCounts(576, 20, (180, 77, 15)))
    plan = plan_request([feature(image, 5, 180), feature(OTHERS, 200, 288 + 2 * 172)])
    assert plan is not None
    assert plan.patches_per_placeholder == (576, 180)
    assert plan.largest_item == 288 + 2 * 172


@pytest.mark.parametrize(
    "lengths", [(3 * 172,), (172, 172, 288), (3 * 288,), (289, 171, 172), (288 + 2 * 172 + 1,)]
)
def test_frames_in_another_order_are_an_error(lengths):
    with pytest.raises(CountsMismatchError, match=r"172 .* of each of 3 frames, 288 of the first"):
        plan_request([feature(OTHERS, 5, *lengths)])
