"""Measured signals against transformers' own attention and keys."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from demo.drawing import draw
from demo.scenes import make_scene
from evaluation.signals import Signals, content_auc, measure
from vitcop_vllm.demo.checkpoint import LlavaShape, save_random_llava
from vitcop_vllm.pruning.saliency import attention_received, cls_saliency

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
def path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("signals")
    save_random_llava(path, SHAPE)
    return str(path)


def test_the_auc_is_the_share_of_pairs_in_order():
    shown = np.array([True, False, True, False, False])
    assert content_auc(np.array([5.0, 1.0, 4.0, 2.0, 3.0]), shown) == 1.0
    assert content_auc(np.array([0.0, 1.0, 0.0, 2.0, 3.0]), shown) == 0.0
    # Of six pairs four are in order, and one is a tie.
    assert content_auc(np.array([3.0, 1.0, 1.5, 1.5, 2.0]), shown) == pytest.approx(4.5 / 6)


@pytest.mark.slow
def test_the_encoder_s_attention_ranks_patches_like_stage_i(path):
    image = draw(make_scene(np.random.default_rng(3)))
    signals = Signals(path)
    recorded = []
    tower = signals.model.model.vision_tower
    # The layer whose output LLaVA-1.5 reads: the second-last.
    attention = tower.encoder.layers[-2].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        projection.register_forward_hook(lambda *given: recorded.append(given[-1]))
    seen = signals.encoder_attention(image)
    queries, keys = (one.unflatten(-1, (SHAPE.vision_heads, -1)) for one in recorded)
    saliency = cls_saliency(queries[:, 0], keys, attention.scale)[0]
    assert spearmanr(seen[0], saliency)[0] == pytest.approx(1.0, abs=1e-4)
    received = attention_received(queries, keys, attention.scale)[0, 1:]
    # Stage I samples the queries.
    assert spearmanr(seen.mean(axis=0), received)[0] > 0.9


@pytest.mark.slow
def test_the_decoder_s_signals_are_those_of_visual_tokens(path):
    image, question = draw(make_scene(np.random.default_rng(3))), "Where is the star?"
    signals = Signals(path)
    norms, seen = signals.decoder_signals(image, question)
    assert norms.shape == seen.shape == (SHAPE.layers, SHAPE.visual_tokens)
    prompt = f"<s>USER: <image>\n{question} ASSISTANT:"
    inputs = signals.processor(
        images=image, text=prompt, return_tensors="pt", add_special_tokens=False
    )
    with torch.inference_mode():
        whole = signals.model(**inputs, output_attentions=True)
    begin = len(signals.processor.tokenizer("<s>USER: ", add_special_tokens=False).input_ids)
    visual = slice(begin, begin + SHAPE.visual_tokens)
    for layer, attention in enumerate(whole.attentions):
        np.testing.assert_allclose(seen[layer], attention[0, :, -1, visual].mean(dim=0), rtol=1e-4)
        keys = whole.past_key_values.layers[layer].keys[0][:, visual].double()
        np.testing.assert_allclose(norms[layer], keys.norm(dim=-1).mean(dim=0), rtol=1e-4)


@pytest.mark.slow
def test_averages_over_images_are_reproducible(path):
    signals = Signals(path)
    found = measure(signals, 2, seed=1)
    assert [row["layer"] for row in found["decoder"]] == list(range(SHAPE.layers))
    assert all(0 <= row["auc"] <= 1 for row in found["encoder"])
    assert found == measure(signals, 2, seed=1)
    assert found != measure(signals, 2, seed=2)
