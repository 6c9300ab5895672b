"""The processor resizes an image to the planned number of visual tokens. No engine runs."""

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import llava_next_checkpoint
from benchmarks.qwen_checkpoint import TINY
from tests.families.family import LLAVA_NEXT, QWEN2_5_VL, Family
from vitcop_vllm.models.processing import COUNTS_FIELD, shape_of_row
from vitcop_vllm.pruning.grids import Grid

SIZES = [(560, 392), (1400, 700), (60, 2000)]


@pytest.fixture(scope="module")
def processor_of(checkpoint_of: Any) -> Any:
    """A family and processor keywords of the operator -> the tiny checkpoint's processor."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    def processor_of(family: Family, processor_kwargs: dict[str, Any]) -> Any:
        load_general_plugins()
        options = EngineArgs(
            model=str(checkpoint_of(family)),
            max_model_len=1024,
            mm_processor_kwargs=processor_kwargs,
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
    assert place.length == shape.counts.stages[0] < planned.num_tokens


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
