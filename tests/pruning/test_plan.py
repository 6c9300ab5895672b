import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vitcop_vllm.pruning.plan import (
    RequestPlan,
    VisualSpan,
    VisualTokenCounts,
    effective_ratio,
    plan_counts,
    plan_video,
)
from vitcop_vllm.pruning.settings import FractionRow, PruningSettings

DEFAULTS = PruningSettings()

layers = st.integers(4, 80)
tokens = st.integers(1, 3000)
ratios = st.floats(0.0, 0.999, allow_subnormal=False) | st.sampled_from(
    [0.1, 0.25, 0.5, 0.667, 0.75, 0.778, 0.889, 0.9, 0.95]
)


def average(ratio, num_layers, encoder_tokens):
    counts = plan_counts(DEFAULTS, ratio, num_layers, encoder_tokens)
    return counts.layer_average(DEFAULTS.boundaries(num_layers), num_layers)


@pytest.mark.parametrize(
    ("ratio", "stages", "centres", "layer_average"),
    [
        (2 / 3, (288, 253, 51), 51, 192.1),
        (0.667, (288, 253, 51), 51, 192.1),
        (7 / 9, (230, 165, 33), 34, 127.8),
        (0.778, (230, 165, 33), 34, 127.8),
        (8 / 9, (172, 77, 15), 20, 63.6),
        (0.889, (172, 77, 15), 20, 63.6),
    ],
)
def test_counts_are_the_published_ones(ratio, stages, centres, layer_average):
    counts = plan_counts(DEFAULTS, ratio, 32, 576)
    assert counts == VisualTokenCounts(576, centres, stages)
    assert counts.layer_average((2, 22), 32) == pytest.approx(layer_average, abs=0.05)


def test_ratio_zero_prunes_nothing():
    counts = plan_counts(DEFAULTS, 0.0, 32, 576)
    assert counts == VisualTokenCounts.unpruned(576)
    assert not counts.is_pruned
    assert counts.dropped == (0, 0, 0)


@given(ratios, layers, tokens)
def test_counts_never_grow_from_stage_to_stage(ratio, num_layers, encoder_tokens):
    counts = plan_counts(DEFAULTS, ratio, num_layers, encoder_tokens)
    n1, n2, n3 = counts.stages
    assert encoder_tokens >= n1 >= n2 >= n3 >= 1
    assert 0 <= counts.centres <= n1
    assert (counts.centres == 0) == (not counts.is_pruned)


@settings(max_examples=400)
@given(ratios, layers, tokens)
def test_layer_average_matches_the_ratio(ratio, num_layers, encoder_tokens):
    counts = plan_counts(DEFAULTS, ratio, num_layers, encoder_tokens)
    if 1 in counts.stages:
        return  # a segment keeps at least one token, so the average may be larger
    wanted = (1 - ratio) * encoder_tokens
    assert abs(average(ratio, num_layers, encoder_tokens) - wanted) <= 2


@settings(max_examples=400)
@given(ratios, ratios, layers, tokens)
@example(0.11, 0.115, 70, 10)
def test_a_higher_ratio_does_not_keep_more_tokens(one, other, num_layers, encoder_tokens):
    low, high = sorted((one, other))
    # Counts are integers, so rounding may add one token.
    assert average(high, num_layers, encoder_tokens) <= average(low, num_layers, encoder_tokens) + 1


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.2, 0.3])
def test_mild_ratios_drop_no_token_in_stage_two(ratio):
    n1, n2, n3 = plan_counts(DEFAULTS, ratio, 32, 576).stages
    assert n1 == n2 > n3


def test_fractions_are_interpolated_between_rows():
    low, middle, high = (plan_counts(DEFAULTS, ratio, 32, 9000) for ratio in (8 / 9, 5 / 6, 7 / 9))
    assert middle.stages[0] == pytest.approx((low.stages[0] + high.stages[0]) / 2, abs=1)


def test_a_single_row_of_fractions_applies_at_every_ratio():
    row = FractionRow(keep=0.2, encoder=0.6, centres=0.1)
    for ratio in (0.5, 0.7, 0.8):
        counts = plan_counts(PruningSettings(fractions=(row,)), ratio, 32, 1000)
        assert counts.stages[0] == 600


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="outside"):
        plan_counts(DEFAULTS, ratio, 32, 576)


@pytest.mark.parametrize("encoder_tokens", [0, -3])
def test_image_without_tokens_is_refused(encoder_tokens):
    with pytest.raises(ValueError, match="at least one visual token"):
        plan_counts(DEFAULTS, 0.5, 32, encoder_tokens)


@pytest.mark.parametrize(
    ("centres", "stages"), [(1, (5, 6, 1)), (1, (5, 3, 0)), (6, (5, 3, 1)), (1, (11, 3, 1))]
)
def test_impossible_counts_are_refused(centres, stages):
    with pytest.raises(ValueError, match="impossible"):
        VisualTokenCounts(10, centres, stages)


@given(ratios, layers, tokens)
def test_counts_survive_encoding(ratio, num_layers, encoder_tokens):
    counts = plan_counts(DEFAULTS, ratio, num_layers, encoder_tokens)
    assert VisualTokenCounts.decode(counts.encode()) == counts


def test_different_counts_have_different_encodings():
    plans = [plan_counts(DEFAULTS, ratio, 32, 576) for ratio in (0.0, 0.5, 2 / 3, 7 / 9, 8 / 9)]
    assert len({counts.encode() for counts in plans}) == len(plans)


@pytest.mark.parametrize("text", ["", "576", "576.20.172.77", "a.b.c.d.e", "10.1.5.6.1"])
def test_text_that_encodes_no_counts_is_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        VisualTokenCounts.decode(text)


def test_effective_ratio_weighs_images_by_their_tokens():
    large, small = VisualTokenCounts(100, 1, (50, 50, 50)), VisualTokenCounts.unpruned(20)
    assert effective_ratio([large, small], (2, 22), 32) == pytest.approx(50 / 120)
    assert effective_ratio([small], (2, 22), 32) == 0.0
    assert effective_ratio([], (2, 22), 32) is None


COMPARING = [
    PruningSettings(compare_frames=True),
    PruningSettings(compare_frames=True, selector="received"),
]
frames = st.integers(1, 800)


def averages(video, setting, num_layers):
    boundaries = setting.boundaries(num_layers)
    return [counts.layer_average(boundaries, num_layers) for counts in video]


@settings(max_examples=400)
@given(st.sampled_from(COMPARING), ratios, layers, tokens, frames)
def test_a_video_s_frames_together_keep_what_the_ratio_asks(
    setting, ratio, num_layers, frame_tokens, num_frames
):
    """Each frame's counts are rounded like an image's, to about 2 tokens."""
    video = plan_video(setting, ratio, num_layers, frame_tokens, num_frames)
    if any(1 in counts.stages for counts in video):
        return  # a segment keeps at least one token, so the average may be larger
    first, others = averages(video, setting, num_layers)
    wanted = (1 - ratio) * frame_tokens * num_frames
    assert abs(first + (num_frames - 1) * others - wanted) <= 2 * num_frames


@settings(max_examples=400)
@given(st.sampled_from(COMPARING), ratios, layers, tokens, st.integers(2, 800))
def test_the_first_frame_keeps_more_up_to_twice_as_much_as_an_image(
    setting, ratio, num_layers, frame_tokens, num_frames
):
    video = plan_video(setting, ratio, num_layers, frame_tokens, num_frames)
    image = plan_counts(setting, ratio, num_layers, frame_tokens)
    first, others = averages(video, setting, num_layers)
    (alone,) = averages([image], setting, num_layers)
    assert first >= alone - 1
    assert others <= alone + 1
    if 1 not in (*video.first.stages, *video.others.stages, *image.stages):
        assert first <= 2 * alone + 5
        assert others >= alone / 2 - 3
    # All frames of a video are pruned, or none.
    assert video.first.is_pruned == video.others.is_pruned == image.is_pruned
    assert {video.first.encoder, video.others.encoder} == {frame_tokens}


@pytest.mark.parametrize("setting", COMPARING, ids=lambda setting: setting.selector)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 2 / 3, 8 / 9])
def test_a_video_of_one_frame_is_an_image(setting, ratio):
    image = plan_counts(setting, ratio, 32, 576)
    assert plan_video(setting, ratio, 32, 576, 1) == (image, image)


@given(ratios, layers, tokens, frames)
def test_all_frames_have_the_counts_of_an_image_unless_frames_are_compared(
    ratio, num_layers, frame_tokens, num_frames
):
    image = plan_counts(DEFAULTS, ratio, num_layers, frame_tokens)
    assert plan_video(DEFAULTS, ratio, num_layers, frame_tokens, num_frames) == (image, image)


def test_counts_of_a_compared_video():
    setting = PruningSettings(compare_frames=True, selector="received")
    kept = [
        [counts.stages[0] for counts in plan_video(setting, 8 / 9, 28, 360, num_frames)]
        for num_frames in (1, 2, 3, 5, 41)
    ]
    # An image keeps 40 of 360 tokens.
    assert kept == [[40, 40], [60, 20], [80, 20], [80, 30], [80, 39]]
    # A first frame keeps no more than all tokens but one.
    assert plan_video(setting, 0.25, 28, 360, 5).first.stages[0] == 359


def test_the_largest_ratio_of_a_video_has_a_plan():
    video = plan_video(COMPARING[0], 1.0 - 2.0**-53, 32, 576, 9)
    assert video.first.stages[-1] == video.others.stages[-1] == 1


STRONG = VisualTokenCounts(576, 20, (172, 77, 15))
MILD = VisualTokenCounts(20, 1, (10, 10, 4))
PLAN = RequestPlan((VisualSpan(5, STRONG), VisualSpan(177, MILD), VisualSpan(200, STRONG)))


@pytest.mark.parametrize(
    ("num_tokens", "lengths"),
    [
        (0, (0, 0, 0)),
        (5, (5, 5, 5)),
        (176, (176, 176, 176)),  # one token before the first span's end
        (177, (177, 82, 20)),
        (186, (186, 91, 29)),
        (187, (187, 92, 24)),
        (200, (200, 105, 37)),
        (371, (371, 276, 208)),
        (372, (372, 182, 52)),
        (1000, (1000, 810, 680)),
    ],
)
def test_slots_of_a_span_are_dropped_at_its_end(num_tokens, lengths):
    assert tuple(PLAN.num_slots(num_tokens, segment) for segment in range(3)) == lengths


@st.composite
def request_plans(draw):
    spans, offset = [], 0
    for _ in range(draw(st.integers(0, 4))):
        offset += draw(st.integers(0, 9))
        encoder = draw(st.integers(1, 30))
        n1 = draw(st.integers(1, encoder))
        n2 = draw(st.integers(1, n1))
        n3 = draw(st.integers(1, n2))
        spans.append(VisualSpan(offset, VisualTokenCounts(encoder, 1, (n1, n2, n3))))
        offset = spans[-1].end
    return RequestPlan(tuple(spans))


def cuts_no_pruned_span(plan, end):
    return not any(span.offset < end < span.end for span in plan.spans if span.counts.is_pruned)


@given(request_plans())
def test_slots_are_tokens_minus_the_dropped_ones(plan):
    whole = [end for end in range(150) if cuts_no_pruned_span(plan, end)]
    for segment in range(3):
        dropped = 0
        for end in whole:
            dropped = sum(s.counts.dropped[segment] for s in plan.spans if s.end <= end)
            assert plan.num_slots(end, segment) == end - dropped
        lengths = [plan.num_slots(end, segment) for end in whole]
        assert lengths == sorted(set(lengths))
    for end in whole:
        first, second, third = (plan.num_slots(end, segment) for segment in range(3))
        assert end == first >= second >= third >= 0


@given(request_plans(), st.integers(0, 150), st.integers(0, 60))
def test_last_whole_end_is_the_largest_that_cuts_no_pruned_span(plan, start, length):
    if not cuts_no_pruned_span(plan, start):
        return
    wanted = max(e for e in range(start, start + length + 1) if cuts_no_pruned_span(plan, e))
    assert plan.last_whole_end(start, start + length) == wanted


def test_last_whole_end_is_the_start_of_a_span_that_does_not_fit():
    assert PLAN.last_whole_end(5, 100) == 5
    assert PLAN.last_whole_end(0, 100) == 5
    assert PLAN.last_whole_end(0, 177) == 177


@given(request_plans(), st.integers(0, 100), st.integers(0, 100))
def test_spans_in_returns_the_spans_that_begin_in_the_range(plan, start, end):
    inside = plan.spans_in(start, end)
    assert list(inside) == [s for s in plan.spans if s.offset in range(start, end)]


def test_plan_without_images_drops_nothing():
    plan = RequestPlan(())
    assert not plan.is_pruned
    assert not plan.drops_slots
    assert plan.num_slots(77, 2) == 77
    assert plan.last_whole_end(3, 9) == 9


def test_plan_pruned_in_the_encoder_alone_drops_no_slots():
    plan = RequestPlan((VisualSpan(0, VisualTokenCounts(10, 1, (5, 5, 5))),))
    assert plan.is_pruned
    assert not plan.drops_slots
    assert PLAN.drops_slots


def test_an_unpruned_span_may_be_computed_in_chunks():
    """The same holds beside a pruned span."""
    pruned = VisualTokenCounts(20, 1, (8, 4, 2))
    plan = RequestPlan((VisualSpan(10, VisualTokenCounts.unpruned(20)), VisualSpan(40, pruned)))
    assert not any(plan.cuts_span(length) for length in range(41))
    assert all(plan.cuts_span(length) for length in range(41, 48))
    assert plan.last_whole_end(0, 20) == 20
    assert plan.last_whole_end(20, 45) == 40
    assert [plan.next_span_end(after) for after in (0, 30, 48)] == [30, 48, None]
