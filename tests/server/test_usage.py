"""Token counts of processed prompts, and their fields in usage."""

import json
from collections.abc import Iterable
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest

from vitcop_server.usage import (
    PrunedModel,
    counts_by_modality,
    extend_event,
    image_identifiers,
)
from vitcop_vllm.pruning.identity import tag_identifier
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import PruningSettings

MODEL = PrunedModel(PruningSettings(), num_layers=32)
PRUNED = VisualTokenCounts(576, 20, (172, 83, 17))


def all_counts(identifiers: Iterable[str]) -> list[VisualTokenCounts]:
    return [*chain.from_iterable(counts_by_modality(identifiers).values())]


def names(*counts: VisualTokenCounts) -> list[str]:
    return [f"a@b{index}@{image.encode()}" for index, image in enumerate(counts)]


def engine_input(*counts: VisualTokenCounts) -> dict[str, Any]:
    hashes = names(*counts)
    return {"type": "multimodal", "prompt_token_ids": [1], "mm_hashes": {"image": hashes}}


def test_counts_come_from_the_tags() -> None:
    inputs = [engine_input(PRUNED, VisualTokenCounts.unpruned(9)), engine_input(PRUNED)]
    found = image_identifiers(inputs)
    assert found == [*names(PRUNED, VisualTokenCounts.unpruned(9)), *names(PRUNED)]
    assert all_counts(found) == [PRUNED, VisualTokenCounts.unpruned(9), PRUNED]


def test_text_has_no_images() -> None:
    assert image_identifiers([{"type": "token", "prompt_token_ids": [1]}]) == []


def test_an_untagged_image_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="without visual token counts"):
        counts_by_modality(["abc"])


def test_fields_of_one_image() -> None:
    fields = MODEL.usage_fields([PRUNED])
    assert fields["visual_tokens"] == {"encoder": 576, "stages": [172, 83, 17]}
    kept = (2 * 172 + 20 * 83 + 10 * 17) / 32
    assert fields["pruning_ratio"] == pytest.approx(1 - kept / 576)


def test_fields_sum_over_images() -> None:
    fields = MODEL.usage_fields([PRUNED, VisualTokenCounts.unpruned(576)])
    assert fields["visual_tokens"] == {"encoder": 1152, "stages": [748, 659, 593]}
    assert fields["pruning_ratio"] == pytest.approx(
        MODEL.usage_fields([PRUNED])["pruning_ratio"] / 2
    )


def test_a_video_counts_as_its_frames() -> None:
    inputs = [
        {"mm_hashes": {"video": [tag_identifier("v", PRUNED, 3)], "image": names(PRUNED)}},
        {"mm_hashes": {"video": [tag_identifier("w", PRUNED, 1)]}},
    ]
    found = image_identifiers(inputs)
    assert all_counts(found) == [PRUNED] * 5
    assert counts_by_modality(found) == {"image": [PRUNED], "video": [PRUNED] * 4}
    fields = MODEL.usage_fields(all_counts(found), len(counts_by_modality(found)["video"]))
    assert fields["visual_tokens"] == {
        "encoder": 5 * 576,
        "stages": [5 * 172, 5 * 83, 5 * 17],
        "frames": 4,
    }
    assert fields["pruning_ratio"] == MODEL.usage_fields([PRUNED])["pruning_ratio"]


def test_tokens_after_a_video_s_frames_are_not_counted() -> None:
    found = image_identifiers(
        [{"mm_hashes": {"video": [tag_identifier("v", PRUNED, 3, tail=1)], "image": []}}]
    )
    assert all_counts(found) == counts_by_modality(found)["video"] == [PRUNED] * 3


def test_a_video_s_first_frame_may_keep_more() -> None:
    first = VisualTokenCounts(576, 51, (288, 253, 51))
    found = image_identifiers(
        [{"mm_hashes": {"video": [tag_identifier("v", PRUNED, 3, first)], "image": names(PRUNED)}}]
    )
    assert all_counts(found) == [PRUNED, first, PRUNED, PRUNED]
    fields = MODEL.usage_fields(all_counts(found), len(counts_by_modality(found)["video"]))
    assert fields["visual_tokens"] == {
        "encoder": 4 * 576,
        "stages": [288 + 3 * 172, 253 + 3 * 83, 51 + 3 * 17],
        "frames": 3,
    }


def test_unpruned_is_exactly_zero() -> None:
    assert MODEL.usage_fields([VisualTokenCounts.unpruned(577)])["pruning_ratio"] == 0.0


def test_no_images_is_null() -> None:
    assert MODEL.usage_fields([]) == {"pruning_ratio": None, "visual_tokens": None}


def test_an_event_with_usage_is_extended() -> None:
    event = 'data: {"choices":[{"delta":{"content":"é"}}],"usage":{"prompt_tokens":3}}\n\n'
    extended = extend_event(event, {"pruning_ratio": 0.5})
    assert extended.endswith("\n\n")
    assert "é" in extended
    chunk = json.loads(extended.removeprefix("data: "))
    assert chunk["usage"] == {"prompt_tokens": 3, "pruning_ratio": 0.5}


@pytest.mark.parametrize(
    "event",
    [
        "data: [DONE]\n\n",
        ": keep-alive\n\n",
        'data: {"choices":[{"delta":{"content":"x"}}]}\n\n',
        'data: {"choices":[],"usage":null}\n\n',
        'data: {"text":"\\"usage\\":{"}\n\n',
        'data: {"choices":[{"usage":{"a":1}}]}\n\n',
        'data: {"error":{"message":"no","code":500}}\n\n',
    ],
)
def test_an_event_without_usage_is_not_changed(event: str) -> None:
    assert extend_event(event, {"pruning_ratio": 0.5}) is event


def model_config(**hf_config: Any) -> SimpleNamespace:
    return SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["NewModel"], **hf_config),
        hf_text_config=SimpleNamespace(num_hidden_layers=8),
    )


def test_the_model_is_read_from_its_configuration() -> None:
    settings = PruningSettings(default_ratio=0.5)
    config = model_config(pruning=settings.model_dump(mode="json"))
    assert PrunedModel.from_config(config) == PrunedModel(settings, 8)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"NewModel.*VLLM_PLUGINS"):
        PrunedModel.from_config(model_config())
