"""The processor resizes an image to the planned number of visual tokens. No engine runs."""

from typing import Any

import pytest
from PIL import Image

from benchmarks.qwen_checkpoint import TINY
from tests.families.family import QWEN2_5_VL
from vitcop_vllm.models.processing import COUNTS_FIELD, shape_of_row

SIZES = [(560, 392), (1400, 700), (60, 2000)]


@pytest.fixture(scope="module")
def processor_of(checkpoint_of: Any) -> Any:
    """Processor keywords of the operator -> the tiny Qwen2.5-VL's processor."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    def processor_of(processor_kwargs: dict[str, Any]) -> Any:
        load_general_plugins()
        options = EngineArgs(
            model=str(checkpoint_of(QWEN2_5_VL)),
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
    processor = processor_of(processor_kwargs)
    planned = processor.info.layout(width, height)
    assert min_tokens <= planned.num_tokens <= max_tokens
    if not processor_kwargs:
        assert (planned.rows, planned.columns) == TINY.grid(width, height)

    items = processor.info.parse_mm_data({"image": Image.new("RGB", (width, height))})
    processed = processor(
        QWEN2_5_VL.opening,
        mm_items=items,
        hf_processor_mm_kwargs={"pruning_ratio": 2 / 3},
    )
    (image,) = processed["mm_kwargs"]["image"]
    shape = shape_of_row(image[COUNTS_FIELD].data.tolist())
    assert (shape.rows, shape.columns) == (planned.rows, planned.columns)
    assert shape.counts.encoder == planned.num_tokens
    (place,) = processed["mm_placeholders"]["image"]
    assert place.length == shape.counts.stages[0] < planned.num_tokens
