"""The processor turns what a request asks for into counts of each image. No engine runs."""

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from vllm.multimodal.processing.inputs import ProcessorInputs

from tests.engine.requests import VIDEO_MARK
from tests.families.family import FAMILIES, LLAVA, QWEN2_5_VL, QWEN3_VL, Family
from vitcop_vllm.pruning.identity import counts_by_frame
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import PruningSettings

AUTO = {"pruning_ratio": "auto", "pruning_bounds": (0.5, 0.95)}
BLANK = Image.new("RGB", (336, 336), "white")


def page(lines: int) -> Image.Image:
    image = BLANK.copy()
    for number in range(lines):
        font = ImageFont.load_default(size=14)
        ImageDraw.Draw(image).text((5, 20 * number), "Text, text, and more text", "black", font)
    return image


def process(processor: Any, prompt: str, data: dict[str, Any], **kwargs: Any) -> Any:
    items = processor.info.parse_mm_data(data)
    return processor(prompt, mm_items=items, hf_processor_mm_kwargs=kwargs)


def counts_of(processed: Any, modality: str = "image") -> list[list[VisualTokenCounts]]:
    return [counts_by_frame(name) for name in processed["mm_hashes"][modality]]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.name))
def test_each_image_of_a_request_gets_its_own_ratio(processor_of: Any, family: Family) -> None:
    processor = processor_of(family, {})
    images = [BLANK, page(16)]
    prompt = family.opening * 2
    (plain,), (written,) = counts_of(process(processor, prompt, {"image": images}, **AUTO))
    assert plain.encoder == written.encoder
    assert plain.stages[-1] < written.stages[-1] < written.encoder
    for image, counts in ((BLANK, plain), (page(16), written)):
        alone = counts_of(process(processor, family.opening, {"image": image}, **AUTO))
        assert alone == [[counts]]


def test_auto_and_a_ratio_with_equal_counts_have_one_identifier(processor_of: Any) -> None:
    processor = processor_of(LLAVA, {})
    mark, data = LLAVA.opening, {"image": BLANK}
    auto = process(processor, mark, data, pruning_ratio="auto")
    named = process(processor, mark, data, pruning_ratio=11 / 12)
    assert auto["mm_hashes"] == named["mm_hashes"]
    assert auto["prompt_token_ids"] == named["prompt_token_ids"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.name))
def test_a_budget_holds_for_images_of_any_size(processor_of: Any, family: Family) -> None:
    processor = processor_of(family, {})
    images = [BLANK, BLANK.resize((672, 448)), BLANK.resize((56, 56))]
    budget = 12
    processed = process(processor, family.opening * 3, {"image": images}, pruning_budget=budget)
    info = processor.info
    layers = info.get_hf_config().get_text_config().num_hidden_layers
    boundaries = info.settings.boundaries(layers)
    for (counts,) in counts_of(processed):
        if counts.encoder <= budget:
            assert not counts.is_pruned
        else:
            kept = counts.layer_average(boundaries, layers)
            # At least one token is left in each stage, and counts are integers.
            assert kept == pytest.approx(max(budget, 0.05 * counts.encoder), abs=2)


@pytest.mark.parametrize("earlier", [{"pruning_ratio": 0}, AUTO])
def test_an_image_known_by_its_uuid_only_keeps_its_detail(
    processor_of: Any, earlier: dict[str, Any]
) -> None:
    processor = processor_of(LLAVA, {})

    def hashes(image: Image.Image | None, kwargs: dict[str, Any]) -> Any:
        items = processor.info.parse_mm_data({"image": [image]})
        inputs = ProcessorInputs(LLAVA.opening, items, {"image": ["page"]}, kwargs)
        return processor._get_mm_hashes(inputs)

    sent = hashes(page(16), earlier)
    known = hashes(None, AUTO)
    assert known == hashes(page(16), AUTO)
    assert (known == sent) == (earlier is AUTO)


@pytest.mark.parametrize("family", [QWEN2_5_VL, QWEN3_VL], ids=lambda family: str(family.name))
def test_all_frames_of_a_video_get_the_ratio_of_the_most_detailed(
    processor_of: Any, family: Family
) -> None:
    processor = processor_of(family, {})

    def counts(*frames: Image.Image) -> list[VisualTokenCounts]:
        number = len(frames)
        description = {
            "fps": 2.0,
            "duration": number / 2,
            "total_num_frames": number,
            "frames_indices": [*range(number)],
            "do_sample_frames": False,
        }
        video = np.stack([np.asarray(frame) for frame in frames])
        found = processor.info.parse_mm_data({"video": [(video, description)]})
        processed = processor(VIDEO_MARK, mm_items=found, hf_processor_mm_kwargs=AUTO)
        return counts_of(processed, "video")[0]

    blank, mixed = counts(*[BLANK] * 4), counts(BLANK, BLANK, page(16), BLANK)
    assert len(set(blank)) == len(set(mixed)) == 1
    assert blank[0].stages[-1] < mixed[0].stages[-1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pruning_budget": 0}, "pruning_budget must be an integer"),
        ({"pruning_budget": 64, "pruning_ratio": 0.5}, "not both"),
        ({"pruning_ratio": "most"}, "'auto' chooses"),
    ],
)
def test_bad_requests_are_refused(processor_of: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process(processor_of(LLAVA, {}), LLAVA.opening, {"image": BLANK}, **kwargs)


def test_the_operator_s_default_may_be_auto(processor_of: Any) -> None:
    processor = processor_of(LLAVA, {})
    processor.info.settings = PruningSettings(default_ratio="auto")
    default = process(processor, LLAVA.opening, {"image": BLANK})
    named = process(processor, LLAVA.opening, {"image": BLANK}, pruning_ratio=11 / 12)
    assert counts_of(default) == counts_of(named)
