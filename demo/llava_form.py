"""The demo model in LLaVA-1.5's form: square images, [CLS], a projector."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from demo.attention import ATTENTION
from demo.drawing import TARGETS
from demo.form import Form, Frame, Ints, Seen
from demo.world import PATCH, Rng
from vitcop_vllm.demo.checkpoint import DEMO, FEATURE_LAYER, LlavaShape, save_config
from vitcop_vllm.demo.tokenizer import VOCABULARY, byte_tokenizer


class LlavaForm(Form):
    """Trained from random weights."""

    image = "<image>"
    around = ("", "\n")
    tower = ".vision_tower."
    matrices = (".layers.", "projector")
    tower_targets = tuple(TARGETS)
    decoder_targets = ()
    merge = 1
    num_summaries = 2

    def __init__(self, shape: LlavaShape = DEMO) -> None:
        self.shape = shape
        self.layers, self.width = shape.layers, shape.hidden
        self.tower_width = shape.vision_hidden

    def build(self, folder: Path, corpus: Iterable[str], seed: int) -> tuple[nn.Module, Any]:
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        tokenizer = byte_tokenizer(corpus, VOCABULARY)
        save_config(folder, self.shape, tokenizer, VOCABULARY)
        torch.manual_seed(seed)
        config = LlavaConfig.from_pretrained(folder, attn_implementation=ATTENTION)
        model: nn.Module = LlavaForConditionalGeneration(config)
        return model, tokenizer

    def frame(self, side: int, rng: Rng) -> Frame:
        return Frame((side, side), side // PATCH, side // PATCH, 1, PATCH)

    def positions(self, ids: Sequence[int], image: int, kept: Ints, frame: Frame) -> Ints:
        return np.arange(len(ids) + 1)[None]

    def see(self, model: Any, pixels: Tensor) -> Seen:
        states = model.model.vision_tower(
            normalised(pixels, model.dtype),
            output_hidden_states=True,
            interpolate_pos_encoding=pixels.shape[1] != self.shape.image_size,
        ).hidden_states
        features = states[FEATURE_LAYER]
        return Seen(features[:, 1:], (features[:, 0], states[-1][:, 0]))

    def embed(self, model: Any, tokens: Tensor) -> Tensor:
        projected: Tensor = model.model.multi_modal_projector(tokens)
        return projected

    def parts(self, model: Any) -> list[nn.Module]:
        return [*model.model.vision_tower.encoder.layers, *super().parts(model)]


def normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, 3, height, width) of ``dtype``, with CLIP's mean and deviation."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean = torch.tensor(OPENAI_CLIP_MEAN, device=pixels.device)
    std = torch.tensor(OPENAI_CLIP_STD, device=pixels.device)
    scaled = (pixels.float() / 255 - mean) / std
    return scaled.permute(0, 3, 1, 2).to(dtype).contiguous()
