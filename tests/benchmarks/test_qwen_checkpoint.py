"""Random Qwen2.5-VL checkpoints: their files, and the visual tokens of images."""

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.ideals import ImagePlan
from benchmarks.qwen_checkpoint import IMAGE_MARKER, SMALL, save_random_qwen
from tests.checkpoints.tiny import QWEN


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_follows_from_shape_and_seed(tmp_path, dtype):
    folders = [tmp_path / name for name in ("one", "again", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        save_random_qwen(folder, QWEN, seed=seed, dtype=dtype)
    one, again, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert {weight.dtype for weight in one.values()} == {getattr(torch, dtype)}
    config = json.loads((folders[0] / "config.json").read_text())
    assert config["dtype"] == dtype
    text, vision = config["text_config"], config["vision_config"]
    assert (text["num_hidden_layers"], text["num_key_value_heads"]) == (QWEN.layers, QWEN.kv_heads)
    assert sum(text["rope_parameters"]["mrope_section"]) == QWEN.hidden // QWEN.heads // 2
    assert vision["window_size"] == 3 * 28
    assert vision["depth"] - 1 in vision["fullatt_block_indexes"]


def test_the_processor_agrees_with_the_shape_s_grid(tmp_path):
    from PIL import Image
    from transformers import AutoProcessor

    save_random_qwen(tmp_path, QWEN)
    processor = AutoProcessor.from_pretrained(tmp_path)
    for size in ((224, 224), (900, 700), (20, 20), (1200, 40), (28, 560)):
        image = Image.new("RGB", size)
        inputs = processor(text=[f"{IMAGE_MARKER}é"], images=[image], return_tensors="pt")
        rows, columns = QWEN.grid(*size)
        assert inputs["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
        # The image, a token on either side, and two bytes of text.
        assert inputs["input_ids"].shape == (1, rows * columns + 4)
    chat = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}],
        add_generation_prompt=True,
    )
    assert IMAGE_MARKER + "Hi" in chat


def test_the_bench_s_shape_has_the_7b_s_boundaries():
    assert (SMALL.image_size, SMALL.visual_tokens) == (1344, 2304)
    assert SMALL.grid(448, 448) == (16, 16)
    assert SMALL.grid(4000, 20) == (1, 143)
    # As in configs/qwen2.5-vl-7b.yaml.
    assert ImagePlan.of(SMALL, 8 / 9, "vitcop").layers == (2, 18, 8)
