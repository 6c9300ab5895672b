"""The recorder keeps selections until they are taken. tests/families checks their content."""

import pytest
import torch
from PIL import Image

from vitcop_vllm.pruning.identity import MOST_EXPLAINED
from vitcop_vllm.pruning.selection import select_stage_two
from vitcop_vllm.worker.explain import ChoiceRecorder, PatchChoice


def recorder_of(llm) -> ChoiceRecorder:
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    # Model runner V2 is vLLM's own; its model state holds the recorder.
    return getattr(runner, "model_state", runner).choices


def test_the_recorder_drops_the_oldest_images_when_full():
    recorder = ChoiceRecorder()
    choice = PatchChoice(torch.arange(3), None, None)
    for number in range(MOST_EXPLAINED + 2):
        recorder.record_patches(f"image {number}", choice)
    assert not recorder.take(["image 0", "image 1"])
    assert recorder.take(["image 2"]) == {"image 2": {"patches": [0, 1, 2]}}


def test_a_merged_group_begins_with_its_output_row():
    norms = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0, 9.0]])
    labels = torch.tensor([[0, 0, 0, 1, 1, 1]])
    recorder = ChoiceRecorder()
    recorder.record_tokens(
        ["a", None], 1, select_stage_two(norms.expand(2, -1), labels.expand(2, -1), 2, 4)
    )
    choice = recorder.take(["a"])["a"]
    assert len(choice["shallow"]) == 4
    assert all(group[0] in choice["shallow"] for group in choice["merged"])
    assert sorted({i for group in choice["merged"] for i in group} | set(choice["shallow"])) == [
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


def test_client_embeddings_have_no_patch_choices(llm):
    """They may share a step with images that record choices."""
    (model,) = llm.collective_rpc("get_model")
    width = model.config.text_config.hidden_size
    model.patch_choices = []
    try:
        embeddings = model.embed_multimodal(image_embeds=torch.zeros(2, 256, width))
        assert model.patch_choices == [None] * len(embeddings) == [None, None]
    finally:
        model.patch_choices = None
