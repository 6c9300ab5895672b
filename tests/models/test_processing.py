"""The processor resizes an image to the planned number of visual tokens. No engine runs."""

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import internvl_checkpoint, llava_next_checkpoint
from benchmarks.qwen_checkpoint import TINY
from tests.families.family import INTERNVL, INTERNVL_CHAT, LLAVA_NEXT, QWEN2_5_VL, Family
from vitcop_vllm.models.processing import COUNTS_FIELD, shape_of_row
from vitcop_vllm.pruning.grids import Grid

SIZES = [(560, 392), (1400, 700), (60, 2000)]


@pytest.fixture(scope="module")
def processor_of(checkpoint_of: Any) -> Any:
    """A family, the operator's keywords and changes of the model's configuration -> the tiny
    checkpoint's processor."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    def processor_of(family: Family, processor_kwargs: dict[str, Any], **overrides: Any) -> Any:
        load_general_plugins()
        options = EngineArgs(
            model=str(checkpoint_of(family)),
            max_model_len=1024,
            mm_processor_kwargs=processor_kwargs,
            trust_remote_code=True,
            hf_overrides=overrides,
        )
        config = options.create_engine_config().model_config
        return MULTIMODAL_REGISTRY.create_processor(config)

    return processor_of


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
        assert planned.grids == (Grid(*TINY.grid(width, height)),)
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
    expected = llava_next_checkpoint.TINY.grids(width, height)
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
        info.layout(width, height).num_tokens
        for height, width in llava_next_checkpoint.TINY.pinpoints
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
    expected = internvl_checkpoint.TINY_CHAT.grids(width, height)
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
