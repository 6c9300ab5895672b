"""The processor turns what a request asks for into counts of each image. No engine runs."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from vllm.multimodal.cache import MultiModalProcessorOnlyCache
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.multimodal.processing.inputs import ProcessorInputs

from tests.engine.requests import VIDEO_MARK
from tests.families.family import FAMILIES, LLAVA, QWEN2_5_VL, QWEN3_VL, Family
from tests.pruning.photographs import photo, write
from vitcop_server.usage import PrunedModel
from vitcop_vllm.models import processing, video_processing
from vitcop_vllm.models.processing import (
    COUNTS_FIELD,
    VIDEO_COUNTS_FIELD,
    shape_of_row,
    video_of_row,
)
from vitcop_vllm.pruning.identity import EXPLAIN_KEY, counts_by_frame, plan_request
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


def video(*frames: Image.Image) -> dict[str, Any]:
    number = len(frames)
    description = {
        "fps": 2.0,
        "duration": number / 2,
        "total_num_frames": number,
        "frames_indices": [*range(number)],
        "do_sample_frames": False,
    }
    return {"video": [(np.stack([np.asarray(frame) for frame in frames]), description)]}


def process(
    processor: Any, prompt: str, data: dict[str, Any], cache: Any = None, **kwargs: Any
) -> Any:
    items = processor.info.parse_mm_data(data)
    return processor(prompt, mm_items=items, hf_processor_mm_kwargs=kwargs, cache=cache)


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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function is called that should be called once."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counting(*args: Any) -> Any:
            counted[name] += 1
            return function(*args)

        monkeypatch.setattr(module, name, counting)

    count(processing, "amount_of")
    count(processing, "dense_share")
    count(video_processing, "dense_share_of_frames")
    return counted


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.name))
def test_an_image_is_looked_at_once(
    processor_of: Any, family: Family, is_cached: bool, calls: Counter[str]
) -> None:
    processor = processor_of(family, {})
    cache = MultiModalProcessorOnlyCache(processor.info.ctx.model_config) if is_cached else None
    process(processor, family.opening, {"image": BLANK}, cache, **AUTO)
    assert calls == {"amount_of": 1, "dense_share": 1}
    calls.clear()
    data = {"image": [page(16), BLANK, page(4)]}  # The second is known.
    processed = process(processor, family.opening * 3, data, cache, **AUTO)
    assert calls == {"amount_of": 1, "dense_share": 3}
    encoded = [
        shape_of_row(item[COUNTS_FIELD].data.tolist()) for item in processed["mm_kwargs"]["image"]
    ]
    assert [[shape.counts] for shape in encoded] == counts_of(processed)


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("family", [QWEN2_5_VL, QWEN3_VL], ids=lambda family: str(family.name))
def test_a_video_is_looked_at_once(
    processor_of: Any, family: Family, is_cached: bool, calls: Counter[str]
) -> None:
    processor = processor_of(family, {})
    cache = MultiModalProcessorOnlyCache(processor.info.ctx.model_config) if is_cached else None
    blank, written = (video(*[image] * 4) for image in (BLANK, page(16)))
    process(processor, VIDEO_MARK, blank, cache, **AUTO)
    calls.clear()
    data = {"image": [BLANK], "video": written["video"] + blank["video"]}
    prompt = family.opening + VIDEO_MARK * 2
    processed = process(processor, prompt, data, cache, **AUTO, **{EXPLAIN_KEY: "request"})
    assert calls == {"amount_of": 1, "dense_share": 1, "dense_share_of_frames": 2}
    encoded = [
        video_of_row(item[VIDEO_COUNTS_FIELD].data.tolist())
        for item in processed["mm_kwargs"]["video"]
    ]
    assert [[frame.counts for frame in shape.frames] for shape in encoded] == counts_of(
        processed, "video"
    )


# The others have some dense patches of their own.
@pytest.mark.parametrize("name", ["coffee", "cat", "rocket"])
def test_a_photograph_with_text_on_it_is_planned_at_the_lower_ratio(
    processor_of: Any, name: str
) -> None:
    processor = processor_of(LLAVA, {})

    def planned(image: Image.Image, ratio: float | str) -> tuple[Any, Any]:
        processed = process(processor, LLAVA.opening, {"image": image}, pruning_ratio=ratio)
        parts = (
            processed[name]["image"][0] for name in ("mm_kwargs", "mm_hashes", "mm_placeholders")
        )
        item, identifier, place = parts
        feature = MultiModalFeatureSpec(item, "image", identifier, place)
        usage = PrunedModel(processor.info.settings, layers).usage_fields
        return plan_request([feature]), usage(counts_by_frame(identifier))

    layers = processor.info.get_hf_config().get_text_config().num_hidden_layers
    plain, written = photo(name), write(photo(name), 4)
    assert planned(plain, "auto") == planned(plain, 11 / 12) != planned(plain, 7 / 9)
    assert planned(written, "auto") == planned(written, 7 / 9)


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

    def planned(image: Image.Image | None, kwargs: dict[str, Any]) -> Any:
        items = processor.info.parse_mm_data({"image": [image]})
        return processor._plan(ProcessorInputs([], items, {"image": ["page"]}, kwargs))

    sent = planned(page(16), earlier)
    known = planned(None, AUTO)
    assert known == planned(page(16), AUTO)
    assert (known == sent) == (earlier is AUTO)


@pytest.mark.parametrize("family", [QWEN2_5_VL, QWEN3_VL], ids=lambda family: str(family.name))
def test_all_frames_of_a_video_get_the_ratio_of_the_most_detailed(
    processor_of: Any, family: Family
) -> None:
    processor = processor_of(family, {})

    def counts(*frames: Image.Image) -> list[VisualTokenCounts]:
        return counts_of(process(processor, VIDEO_MARK, video(*frames), **AUTO), "video")[0]

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
