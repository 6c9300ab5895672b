"""The processor resizes an image to the planned number of visual tokens. No engine runs."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from vllm.multimodal.processing.inputs import ProcessorInputs

from tests.checkpoints import tiny
from tests.engine.requests import VIDEO_MARK
from tests.families.family import (
    FAMILIES,
    INTERNVL,
    INTERNVL_CHAT,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    QWEN2_5_VL,
    QWEN3_VL,
    QWEN3_VL_MOE,
    Family,
    Saved,
)
from tests.families.stage_one_family import STAGE_ONE_FAMILIES
from vitcop_vllm.engine.config import SPAN_LIMIT_KEY
from vitcop_vllm.models.processing import (
    COUNTS_FIELD,
    VIDEO_COUNTS_FIELD,
    shape_of_row,
    video_of_row,
)
from vitcop_vllm.pruning.amount import FixedRatio
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.identity import (
    EXPLAIN_KEY,
    MOST_EXPLAINED,
    counts_by_frame,
    explained_size,
    spans_in_prompt,
)
from vitcop_vllm.pruning.plan import VisualTokenCounts

SIZES = [(560, 392), (1400, 700), (60, 2000)]


@pytest.mark.parametrize(
    "family", [*FAMILIES, *STAGE_ONE_FAMILIES], ids=lambda family: str(family.name)
)
def test_videos_are_taken_by_the_families_whose_pruned_videos_are_tested(
    processor_of: Any, family: Saved
) -> None:
    takes_videos = family in (QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, LLAVA_ONEVISION)
    limits = processor_of(family, {}).info.allowed_mm_limits
    assert limits.keys() == ({"image", "video"} if takes_videos else {"image"})


@pytest.mark.parametrize(
    ("processor_kwargs", "min_tokens", "max_tokens"),
    [
        ({}, 1, 10_000),
        ({"max_pixels": 100_352}, 1, 128),
        ({"min_pixels": 401_408, "max_pixels": 802_816}, 512, 1024),
    ],
)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_plan_follows_the_operator_s_pixel_limits(
    processor_of: Any,
    processor_kwargs: dict[str, Any],
    min_tokens: int,
    max_tokens: int,
    width: int,
    height: int,
) -> None:
    processor = processor_of(QWEN2_5_VL, processor_kwargs)
    planned = processor.info.layout(width, height)
    assert min_tokens <= planned.num_tokens <= max_tokens
    if not processor_kwargs:
        assert planned.grids == (Grid(*tiny.QWEN.grid(width, height)),)
    assert_processed_as_planned(processor, QWEN2_5_VL, width, height)


def assert_processed_as_planned(processor: Any, family: Family, width: int, height: int) -> None:
    planned = processor.info.layout(width, height)
    items = processor.info.parse_mm_data({"image": Image.new("RGB", (width, height))})
    processed = processor(
        family.opening,
        mm_items=items,
        hf_processor_mm_kwargs={"pruning_ratio": 2 / 3},
    )
    (image,) = processed["mm_kwargs"]["image"]
    shape = shape_of_row(image[COUNTS_FIELD].data.tolist())
    assert shape.grids == planned.grids
    assert shape.counts.encoder == planned.num_tokens
    (place,) = processed["mm_placeholders"]["image"]
    ((first, last),) = place.extract_embeds_range()
    assert last + 1 - first == shape.counts.stages[0] < planned.num_tokens
    if family.tokens_around:
        tokens = processed["prompt_token_ids"][place.offset : place.offset + place.length]
        kept = [family.image_token] * shape.counts.stages[0]
        before, after = family.tokens_around
        assert tokens == [before, *kept, after]


VIDEO_SIZES = [(1, 300, 200), (2, 60, 700), (5, 301, 299), (8, 1400, 700), (31, 20, 24)]
"""Frames, width and height."""


def video(frames: int, width: int, height: int, *, all_read: bool = False) -> Any:
    """Frames and metadata of a video; ``all_read``: no frame of the file is missing."""
    step = 1 if all_read else 7
    return np.zeros((frames, height, width, 3), dtype=np.uint8), {
        "fps": 24.0,
        "duration": frames * step / 24,
        "total_num_frames": frames * step,
        "frames_indices": [*range(0, frames * step, step)],
        "video_backend": "opencv",
        "do_sample_frames": all_read,
    }


@pytest.mark.parametrize(
    ("family", "keywords", "min_frames", "samples"),
    [
        (QWEN2_5_VL, {}, 1, False),
        (QWEN2_5_VL, {"max_pixels": 40_000}, 1, False),
        (QWEN2_5_VL, {"cap_pixels_per_frame": True, "max_video_tokens": 64}, 1, False),
        (QWEN2_5_VL, {"do_sample_frames": True, "num_frames": 2}, 2, True),
        # Its processor refuses a single frame.
        (QWEN3_VL, {}, 2, False),
        (QWEN3_VL, {}, 2, True),
        (QWEN3_VL, {"size": {"longest_edge": 90_000}}, 2, False),
        (QWEN3_VL, {"fps": 4}, 2, True),
        (QWEN3_VL, {"num_frames": 4}, 4, True),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_plan_of_a_video_is_what_the_processor_makes_of_it(
    processor_of: Any, family: Family, keywords: dict[str, Any], min_frames: int, samples: bool
) -> None:
    """``samples``: the loader read all frames, and the processor takes some of them."""
    processor = processor_of(family, {"videos_kwargs": keywords})
    for frames, width, height in VIDEO_SIZES:
        if frames < min_frames:
            continue
        items = processor.info.parse_mm_data(
            {"video": [video(frames, width, height, all_read=samples)]}
        )
        processed = processor(
            VIDEO_MARK, mm_items=items, hf_processor_mm_kwargs={"pruning_ratio": 2 / 3}
        )
        (made,) = processed["mm_kwargs"]["video"]
        shape = video_of_row(made[VIDEO_COUNTS_FIELD].data.tolist())
        (grid,) = shape.frame.grids
        t, h, w = made["video_grid_thw"].data.tolist()
        assert (shape.num_frames, grid) == (t, Grid(h // 2, w // 2))
        (place,) = processed["mm_placeholders"]["video"]
        (name,) = processed["mm_hashes"]["video"]
        spans = spans_in_prompt(name, place)
        assert len(spans) == t
        assert spans[0].counts == shape.frame.counts
        explained = processor(
            VIDEO_MARK,
            mm_items=items,
            hf_processor_mm_kwargs={"pruning_ratio": 2 / 3, EXPLAIN_KEY: "r"},
        )
        (unique,) = explained["mm_hashes"]["video"]
        assert explained_size(unique) == (width, height)
        assert unique.endswith(name.rpartition("@")[2])
        layout = processor.info.explained_layouts[unique]
        assert (layout.num_frames, layout.grids) == (t, (grid,))
        times = [time for frame in layout.times for time in frame]
        assert times == sorted({*times})
        assert len(times) in (2 * t - 1, 2 * t)
        assert times[-1] <= 7 * (frames - 1) / 24
        kept = shape.frame.counts.stages[0]
        assert kept < grid.num_tokens or grid.num_tokens < 4
        assert processed["prompt_token_ids"].count(family.video_token) == t * kept


@pytest.mark.parametrize("ratio", [0.0, 2 / 3])
def test_a_video_of_onevision_has_all_frames_that_are_read_and_one_token_after_them(
    processor_of: Any, ratio: float
) -> None:
    family = LLAVA_ONEVISION
    assert family.frames is not None
    processor = processor_of(family, {})
    for frames, width, height in VIDEO_SIZES:
        read = video(frames, width, height)
        items = processor.info.parse_mm_data({"video": [read if ratio else read[0]]})
        layout = processor._plan(ProcessorInputs([], items)).videos[0].layout
        seconds = tuple((7 * number / 24.0,) for number in range(frames))
        assert layout.times == (seconds if ratio else None)
        processed = processor(
            "<video>", mm_items=items, hf_processor_mm_kwargs={"pruning_ratio": ratio}
        )
        (made,) = processed["mm_kwargs"]["video"]
        assert len(made["pixel_values_videos"].data) == frames
        shape = video_of_row(made[VIDEO_COUNTS_FIELD].data.tolist())
        (grid,) = shape.frame.grids
        assert (shape.num_frames, grid.num_tokens) == family.frames(frames, width, height)
        assert shape.tail == family.video_tail == 1
        (place,) = processed["mm_placeholders"]["video"]
        (name,) = processed["mm_hashes"]["video"]
        *parts, end = spans_in_prompt(name, place)
        assert [span.counts for span in parts] == [shape.frame.counts] * frames
        assert end.counts == VisualTokenCounts.unpruned(1)
        kept = shape.frame.counts.stages[0]
        assert (kept < grid.num_tokens) == (ratio > 0)
        assert processed["prompt_token_ids"].count(family.video_token) == frames * kept + 1


@pytest.mark.parametrize("family", [QWEN2_5_VL, QWEN3_VL], ids=lambda family: family.name)
def test_if_frames_are_compared_the_first_keeps_more(
    processor_of: Any, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = processor_of(family, {})
    compared = processor.info.settings.model_copy(update={"compare_frames": True})
    monkeypatch.setitem(vars(processor.info), "settings", compared)
    for file_frames in (2, 4, 9):
        items = processor.info.parse_mm_data({"video": [video(file_frames, 300, 200)]})
        processed = processor(
            VIDEO_MARK, mm_items=items, hf_processor_mm_kwargs={"pruning_ratio": 2 / 3}
        )
        (made,) = processed["mm_kwargs"]["video"]
        frames = [
            counts for counts, _ in video_of_row(made[VIDEO_COUNTS_FIELD].data.tolist()).frames
        ]
        (place,) = processed["mm_placeholders"]["video"]
        (name,) = processed["mm_hashes"]["video"]
        assert frames == counts_by_frame(name)
        assert frames == [span.counts for span in spans_in_prompt(name, place)]
        tokens = processed["prompt_token_ids"].count(family.video_token)
        assert tokens == sum(counts.stages[0] for counts in frames)
        kept = [counts.stages[0] for counts in frames]
        assert len(frames) == 1 or min(kept) == kept[-1] < kept[0]
        image = processor.info.counts(frames[0].encoder, FixedRatio(2 / 3))
        assert len(frames) > 1 or frames == [image]

    limit = (kept[0] + kept[1]) // 2
    monkeypatch.setattr(processor.info.get_hf_config(), SPAN_LIMIT_KEY, limit)
    with pytest.raises(ValueError, match=f"holds {limit} tokens, but a frame .* keeps {kept[0]}"):
        processor(VIDEO_MARK, mm_items=items, hf_processor_mm_kwargs={"pruning_ratio": 2 / 3})


@pytest.mark.parametrize("family", [QWEN2_5_VL, QWEN3_VL], ids=lambda family: family.name)
def test_a_video_s_positions_are_counted_before_it_is_processed(
    processor_of: Any, family: Family
) -> None:
    processor = processor_of(family, {})
    frames, metadata = video(10, 140, 84)
    layout = processor.info.video_layout(10, 140, 84, metadata, {})
    grid = layout.grids[0]
    # Two frames of the file are one of the encoder's: 7 of 24 seconds lie between two of these.
    times = int(4 * 2 * 7 / 24 * 4) + 1
    expected = max(times, *grid[:2]) if family == QWEN2_5_VL else 5 * max(grid[:2])
    assert layout.num_positions == expected
    assert layout.num_frames == len(frames) // 2


@pytest.fixture(scope="module")
def llava_next(processor_of: Any) -> Any:
    return processor_of(LLAVA_NEXT, {})


@pytest.mark.parametrize(
    ("width", "height"),
    [(560, 392), (1400, 700), (60, 2000), (2000, 60), (112, 112), (113, 112), (20, 20), (301, 299)],
)
def test_the_plan_of_a_tiled_image_is_what_the_processor_makes_of_it(
    llava_next: Any, width: int, height: int
) -> None:
    planned = llava_next.info.layout(width, height)
    expected = tiny.LLAVA_NEXT.grids(width, height)
    assert planned.grids == tuple(Grid(*grid) for grid in expected)
    assert planned.box == (0, 0, width, height)
    assert_processed_as_planned(llava_next, LLAVA_NEXT, width, height)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_the_plan_of_a_tiled_image_has_as_many_tokens_as_vllm_counts(
    llava_next: Any, width: int, height: int
) -> None:
    info = llava_next.info
    assume(max(width, height) <= 100 * min(width, height))
    num_tokens = info.layout(width, height).num_tokens
    assert num_tokens == info.get_num_image_tokens(image_width=width, image_height=height)
    assert num_tokens <= info.get_max_image_tokens()


def test_a_dummy_image_fits_the_step_if_any_image_does(llava_next: Any) -> None:
    info = llava_next.info
    largest = info.get_max_image_tokens()
    assert info.dummy_size(largest) is None
    tokens = info.layout(*info.dummy_size(largest - 1)).num_tokens
    assert largest // 2 < tokens < largest
    smallest = info.layout(*info.dummy_size(1)).num_tokens
    assert smallest == min(
        info.layout(width, height).num_tokens for height, width in tiny.LLAVA_NEXT.pinpoints
    )


@pytest.fixture(scope="module", params=[INTERNVL_CHAT, INTERNVL], ids=lambda family: family.name)
def internvl(request: pytest.FixtureRequest, processor_of: Any) -> tuple[Family, Any]:
    return request.param, processor_of(request.param, {})


@pytest.mark.parametrize(
    ("width", "height"),
    [(560, 392), (1400, 140), (60, 2000), (141, 140), (20, 20), (198, 198), (199, 199), (301, 299)],
)
def test_the_plan_of_internvl_s_tiles_is_what_the_processor_makes_of_an_image(
    internvl: tuple[Family, Any], width: int, height: int
) -> None:
    family, processor = internvl
    planned = processor.info.layout(width, height)
    expected = tiny.INTERNVL_CHAT.grids(width, height)
    assert planned.grids == tuple(Grid(*grid) for grid in expected)
    assert planned.box == (0, 0, width, height)
    assert_processed_as_planned(processor, family, width, height)


@pytest.mark.parametrize(
    ("overrides", "num_tokens"),
    [
        ({"max_dynamic_patch": 2}, 75),
        ({"dynamic_image_size": False}, 25),
        ({"use_thumbnail": 0}, 200),
    ],
)
def test_the_plan_of_internvl_s_tiles_follows_the_configuration(
    processor_of: Any, overrides: dict[str, Any], num_tokens: int
) -> None:
    processor = processor_of(INTERNVL_CHAT, {}, **overrides)
    assert processor.info.layout(800, 400).num_tokens == num_tokens
    assert_processed_as_planned(processor, INTERNVL_CHAT, 800, 400)


@pytest.mark.parametrize(
    ("keywords", "num_tokens"), [({"max_patches": 2}, 75), ({"crop_to_patches": False}, 25)]
)
def test_the_plan_of_internvl_s_tiles_follows_the_operator_s_keywords(
    processor_of: Any, keywords: dict[str, Any], num_tokens: int
) -> None:
    processor = processor_of(INTERNVL, keywords)
    assert processor.info.layout(800, 400).num_tokens == num_tokens
    assert_processed_as_planned(processor, INTERNVL, 800, 400)


def test_internvl_cuts_tiles_though_the_image_processor_s_configuration_does_not_say_so(
    processor_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is in published checkpoints in the form of transformers."""
    processor = processor_of(INTERNVL, {})
    images = processor.info.get_hf_processor().image_processor
    monkeypatch.setattr(images, "crop_to_patches", False)
    assert processor.info.layout(800, 400).num_tokens == 225
    assert processor.info.get_max_image_tokens() == 250
    assert_processed_as_planned(processor, INTERNVL, 800, 400)


def test_a_dummy_image_of_internvl_fits_the_step_if_any_image_does(
    internvl: tuple[Family, Any],
) -> None:
    info = internvl[1].info
    assert info.get_max_image_tokens() == 250
    assert info.dummy_size(250) is None
    assert info.layout(*info.dummy_size(249)).num_tokens == 225
    assert info.layout(*info.dummy_size(1)).num_tokens == 25


def test_a_request_of_internvl_may_have_images_with_and_without_a_thumbnail(
    internvl: tuple[Family, Any],
) -> None:
    family, processor = internvl
    images = [Image.new("RGB", size) for size in ((20, 20), (300, 300))]
    processed = processor(
        family.opening * 2,
        mm_items=processor.info.parse_mm_data({"image": images}),
        hf_processor_mm_kwargs={"pruning_ratio": 2 / 3},
    )
    shapes = [
        shape_of_row(image[COUNTS_FIELD].data.tolist()) for image in processed["mm_kwargs"]["image"]
    ]
    assert [shape.grids for shape in shapes] == [
        (Grid(5, 5),),
        (Grid(15, 15), Grid(5, 5)),
    ]


def test_an_explanation_has_a_limit_of_frames(processor_of: Any) -> None:
    processor = processor_of(QWEN2_5_VL, {})
    kwargs = {"pruning_ratio": 2 / 3, EXPLAIN_KEY: "r"}
    for frames, fits in ((2 * MOST_EXPLAINED, True), (2 * MOST_EXPLAINED + 1, False)):
        items = processor.info.parse_mm_data({"video": [video(frames, 56, 56)]})
        with nullcontext() if fits else pytest.raises(ValueError, match="256 images and frames"):
            processor(VIDEO_MARK, mm_items=items, hf_processor_mm_kwargs=kwargs)
