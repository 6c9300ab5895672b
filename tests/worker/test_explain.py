"""Selections are kept until the server takes them; what they are, tests/families shows."""

import pytest
import torch
from PIL import Image

from vitcop_vllm.pruning.identity import MOST_EXPLAINED, explained_identifier
from vitcop_vllm.pruning.selection import select_stage_two
from vitcop_vllm.worker.explain import PatchSelection, SelectionSink

NAMES = [explained_identifier("request", n, (64, 48), "abc") for n in range(MOST_EXPLAINED + 2)]
SELECTION = PatchSelection(torch.arange(3), None, None)


class Model:
    sink: SelectionSink | None = None


def sink_of(llm) -> SelectionSink:
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    # Model runner V2 is vLLM's own, and has an adapter beside it.
    if (state := getattr(runner, "model_state", None)) is not None:
        return state.step_adapter.sink
    return runner.sink


def test_old_explanations_make_room():
    sink = SelectionSink()
    for name in NAMES:
        with sink.attached_to(Model(), [name]):
            sink.record_patches([SELECTION])
    assert not sink.take(NAMES[:2])
    assert sink.take(NAMES[2:3]) == {NAMES[2]: {"patches": [0, 1, 2]}}


def test_selections_belong_to_images_in_the_order_in_which_they_are_encoded():
    sink, model = SelectionSink(), Model()
    with sink.attached_to(model, ["abc", NAMES[0], NAMES[1], "abd", NAMES[2]]):
        assert model.sink is sink
        sink.record_patches([SELECTION, None])
        sink.record_patches([SELECTION._replace(patches=torch.arange(2)), SELECTION, SELECTION])
    assert model.sink is None
    assert {name: told["patches"] for name, told in sink._records.items()} == {
        NAMES[1]: [0, 1],
        NAMES[2]: [0, 1, 2],
    }


def test_where_no_image_is_to_be_explained_the_model_has_no_sink():
    sink, model = SelectionSink(), Model()
    with sink.attached_to(model, ["abc"]):
        assert model.sink is None


def test_an_image_that_was_not_encoded_does_not_shift_later_records():
    sink, model = SelectionSink(), Model()
    with pytest.raises(AssertionError, match="not encoded"), sink.attached_to(model, NAMES[:2]):
        sink.record_patches([None])
    assert model.sink is None
    with sink.attached_to(model, NAMES[3:4]):
        sink.record_patches([SELECTION])
    assert [*sink._records] == NAMES[3:4]


def test_a_merged_group_begins_with_its_output_row():
    norms = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0, 9.0]])
    labels = torch.tensor([[0, 0, 0, 1, 1, 1]])
    sink = SelectionSink()
    sink.record_tokens(
        [NAMES[0], "abc"], 1, select_stage_two(norms.expand(2, -1), labels.expand(2, -1), 2, 4)
    )
    told = sink._records.pop(NAMES[0])
    assert not sink._records
    assert len(told["shallow"]) == 4
    assert all(group[0] in told["shallow"] for group in told["merged"])
    assert sorted({i for group in told["merged"] for i in group} | set(told["shallow"])) == [
        *range(6)
    ]


def test_the_layout_s_box_is_the_part_that_the_processor_crops(llm):
    """The image is a colour ramp, so a pixel's colour gives its position in the original."""
    info = llm.llm_engine.renderer.mm_processor.info
    processor = info.get_hf_processor().image_processor
    side = processor.crop_size["height"]
    for width, height in [(224, 224), (500, 250), (301, 640), (100, 90), (1000, 224)]:
        left, top, right, bottom = info.layout(width, height).box
        across = torch.linspace(0, 255, width).round().byte().expand(height, -1)
        down = torch.linspace(0, 255, height).round().byte()[:, None].expand(-1, width)
        ramp = torch.stack((across, down, down), dim=-1).numpy()
        shown = processor(Image.fromarray(ramp), do_normalize=False, return_tensors="pt")
        pixels = shown["pixel_values"][0]
        assert pixels.shape[1:] == (side, side)
        tolerance = 2.5 / min(width, height, side) + 2 / 255
        assert pixels[0, 0, 0] == pytest.approx(left / width, abs=tolerance)
        assert pixels[0, 0, -1] == pytest.approx(right / width, abs=tolerance)
        assert pixels[1, 0, 0] == pytest.approx(top / height, abs=tolerance)
        assert pixels[1, -1, 0] == pytest.approx(bottom / height, abs=tolerance)


def test_embeddings_that_a_client_computed_have_no_selections(llm):
    """But are encoded in the same step as images that are to be explained."""
    (model,) = llm.collective_rpc("get_model")
    width = model.config.text_config.hidden_size
    sink = SelectionSink()
    with sink.attached_to(model, NAMES[:2]):
        assert len(model.embed_multimodal(image_embeds=torch.zeros(2, 256, width))) == 2
    assert not sink._records


def test_encoding_dummy_images_records_nothing(llm, monkeypatch):
    """The first unpruned image has them encoded if vLLM was started without memory profiling."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    model = runner.get_model()
    monkeypatch.setattr(model, "_encoder_ran", False)
    sink = SelectionSink()
    with torch.inference_mode(), sink.attached_to(model, NAMES[:1]):
        model.embed_multimodal(**runner._get_mm_dummy_batch("image", 1))
    assert model._encoder_ran
    assert not sink._records
