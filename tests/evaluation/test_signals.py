"""Measured signals against transformers' own attention and keys."""

from pathlib import Path

import numpy as np
import pytest
import torch

from demo.drawing import draw
from demo.scenes import make_scene
from evaluation.signals import Signals, content_auc, measure, rank_correlation
from vitcop_vllm.demo.checkpoint import LlavaShape, save_random_llava
from vitcop_vllm.pruning import saliency as saliency_module

SHAPE = LlavaShape(
    vision_hidden=32,
    vision_layers=3,
    vision_heads=2,
    hidden=48,
    layers=3,
    heads=3,
    kv_heads=1,
    intermediate=64,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("signals")
    save_random_llava(path, SHAPE)
    return path


def test_auc_and_rank_correlation():
    shown = np.array([True, False, True, False, False])
    assert content_auc(np.array([5.0, 1.0, 4.0, 2.0, 3.0]), shown) == 1.0
    assert content_auc(np.array([0.0, 1.0, 0.0, 2.0, 3.0]), shown) == 0.0
    # Of six pairs four are in order, and one is a tie.
    assert content_auc(np.array([3.0, 1.0, 1.5, 1.5, 2.0]), shown) == pytest.approx(4.5 / 6)
    assert rank_correlation(np.array([1.0, 5.0, 9.0]), np.array([-3.0, 0.0, 8.0])) == 1.0


@pytest.mark.slow
def test_signals_equal_the_model_s(path, monkeypatch):
    monkeypatch.setattr(saliency_module, "MAX_QUERIES", 577)  # all tokens
    image, question = draw(make_scene(np.random.default_rng(3))), "Where is the star?"
    signals = Signals(path)
    saliency, received, norms, seen, distances = signals.read(image, question)
    tokens = SHAPE.visual_tokens
    assert saliency.shape == received.shape == (tokens,)
    assert distances[1] < distances[2] < distances[3], "5th, 50th and 95th percentile"
    assert norms.shape == seen.shape == (SHAPE.layers, tokens)

    pixels = signals.processor.image_processor(image, return_tensors="pt").pixel_values
    prompt = f"<s>USER: <image>\n{question} ASSISTANT:"
    inputs = signals.processor(
        images=image, text=prompt, return_tensors="pt", add_special_tokens=False
    )
    with torch.inference_mode():
        tower = signals.model.model.vision_tower(pixels, output_attentions=True)
        whole = signals.model(**inputs, output_attentions=True)
    # LLaVA-1.5 reads the second-last layer: the attention of its [CLS] is the saliency.
    expected = tower.attentions[-2][0, :, 0, 1:].mean(dim=0).numpy()
    assert rank_correlation(saliency, expected) == pytest.approx(1.0, abs=1e-4)
    of_all = tower.attentions[-2][0, :, :, 1:].mean(dim=(0, 1)).numpy()
    assert rank_correlation(received, of_all) == pytest.approx(1.0, abs=1e-4)
    begin = len(signals.processor.tokenizer("<s>USER: ", add_special_tokens=False).input_ids)
    for layer, attention in enumerate(whole.attentions):
        visual = slice(begin, begin + tokens)
        np.testing.assert_allclose(seen[layer], attention[0, :, -1, visual].mean(dim=0), rtol=1e-4)
        keys = whole.past_key_values.layers[layer].keys[0][:, visual].double()
        np.testing.assert_allclose(norms[layer], keys.norm(dim=-1).mean(dim=0), rtol=1e-4)


@pytest.mark.slow
def test_averages_over_images_are_reproducible(path):
    found = measure(path, 4, seed=1)
    assert 0 < found["images"] <= 4
    for name in ("key_norm_auc", "attention_auc", "key_norm_attention"):
        assert len(found[name]) == SHAPE.layers
    assert 0 <= found["saliency_auc"] <= 1
    assert found == measure(path, 4, seed=1)
