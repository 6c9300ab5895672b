"""The demo model in Qwen2.5-VL's form: images of any size, visual tokens of 2 x 2 patches, M-RoPE.

The decoder begins with the weights of the packaged LLaVA demo, because both decoders have the same
sizes. The vision tower begins with random weights.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.qwen_checkpoint import IMAGE_MARKER, MERGE, QwenShape, save_processor, token_ids
from demo.attention import ATTENTION, WINDOWS
from demo.drawing import TARGETS, Grid
from demo.form import Form, Frame, Ints, Seen
from demo.llava_form import normalised
from demo.scenes import random_size
from demo.world import Rng, Scene
from vitcop_vllm.demo.checkpoint import CHAT_TEMPLATE, DEMO, DEMO_MODEL
from vitcop_vllm.demo.tokenizer import VOCABULARY


@dataclass(frozen=True, kw_only=True)
class DemoQwenShape(QwenShape):
    """Its M-RoPE tells columns apart by more than half of the frequencies and a small base.

    Columns get the lowest frequencies. The larger the base, and the fewer their frequencies, the
    more alike columns look.
    """

    rope_theta: float = 20.0

    @property
    def mrope_section(self) -> list[int]:
        return [4, 10, 18]


DEMO_QWEN = DemoQwenShape(
    # Every image gets about 256 visual tokens, unless a request sets other limits.
    min_visual_tokens=256,
    max_visual_tokens=320,
    vision_hidden=192,
    vision_layers=6,
    vision_heads=3,
    vision_intermediate=512,
    window=4,
    full_attention=(2, 5),
    hidden=DEMO.hidden,
    layers=DEMO.layers,
    heads=DEMO.heads,
    kv_heads=DEMO.kv_heads,
    intermediate=DEMO.intermediate,
)

PLACES = ("row", "column")
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIALS = ("<|vision_start|>", "<|vision_end|>", IMAGE, VIDEO)


class QwenForm(Form):
    """Its images have random sizes. No head finds places in the tower's output: the tower knows
    relative places only, and the decoder gets places from M-RoPE."""

    image = IMAGE
    around = (SPECIALS[0], f"{SPECIALS[1]}\n")
    tower = ".visual."
    matrices = (".layers.", ".blocks.", ".merger.")
    tower_targets = tuple(name for name in TARGETS if name not in PLACES)
    decoder_targets = PLACES
    merge = MERGE
    num_summaries = 0

    def __init__(self, shape: QwenShape = DEMO_QWEN, warm_start: Path | None = DEMO_MODEL) -> None:
        """
        Args:
            shape: Sizes of the model.
            warm_start: Folder of the LLaVA whose decoder to begin with.
        """
        self.shape, self.warm_start = shape, warm_start
        self.layers = shape.layers
        self.width = self.tower_width = shape.hidden

    def build(self, folder: Path, corpus: Iterable[str], seed: int) -> tuple[nn.Module, Any]:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        tokenizer = save_config(folder, self.shape)
        torch.manual_seed(seed)
        config = Qwen2_5_VLConfig.from_pretrained(folder, attn_implementation=ATTENTION)
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
        # Set it now, because the constructor would look for a flash attention of this name.
        model.model.visual.config._attn_implementation = WINDOWS
        embed = model.model.visual.patch_embed
        # The same as its convolution, whose backward pass is many times slower.
        embed.forward = lambda patches: linear(patches, embed.proj.weight.flatten(1))
        if self.warm_start is not None:
            copy_decoder(self.warm_start, model, tokenizer)
        return model, tokenizer

    def frame(self, side: int, rng: Rng) -> Frame:
        width, height = random_size(rng, side)
        zoom = float(rng.uniform(0.75, 1.35)) / self.shape.token_side
        rows, columns = max(2, round(height * zoom)), max(2, round(width * zoom))
        return Frame((width, height), rows, columns, MERGE, self.shape.patch_size)

    def targets(self, scene: Scene, frame: Frame) -> dict[str, Grid]:
        """Rows and columns count from the top left, in steps of three patches.

        Visual tokens do not see the tokens after them, so they cannot know the image's size.
        """
        grids = super().targets(scene, frame)
        shown = grids["row"] > 0
        for name, place in zip(PLACES, np.indices(shown.shape), strict=True):
            grids[name][shown] = np.minimum(place[shown] // 3 + 1, TARGETS[name] - 1)
        return grids

    def positions(self, ids: Sequence[int], image: int, kept: Ints, frame: Frame) -> Ints:
        places = []
        start, tokens, of_images = 0, iter(ids), iter(kept)
        for token in tokens:
            if token != image:
                places.append(np.full((3, 1), start))
                start += 1
                continue
            shown = next(of_images)
            row, column = shown // frame.columns, shown % frame.columns
            places.append(start + np.stack((0 * shown, row, column)))
            start += max(frame.rows, frame.columns)
            for _ in range(len(shown) - 1):
                next(tokens)
        return np.concatenate([*places, np.full((3, 1), start)], axis=1)

    def see(self, model: Any, pixels: Tensor) -> Seen:
        images, height, width, _ = pixels.shape
        side, patch = self.shape.token_side, self.shape.patch_size
        blocks = normalised(pixels, model.dtype).view(
            images, 3, height // side, MERGE, patch, width // side, MERGE, patch
        )
        patches = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 3, 1, patch * patch)
        grid = torch.tensor([[1, height // patch, width // patch]] * images, device=pixels.device)
        # An image counts as two equal frames.
        tokens = model.model.visual(patches.expand(-1, -1, 2, -1).flatten(1), grid).pooler_output
        return Seen(tokens.view(images, -1, tokens.shape[-1]))

    def embed(self, model: Any, tokens: Tensor) -> Tensor:
        return tokens

    def parts(self, model: Any) -> list[nn.Module]:
        return [*(block.mlp for block in model.model.visual.blocks), *super().parts(model)]


def save_config(folder: Path, shape: QwenShape) -> Any:
    """Write configuration, processor and tokenizer. Returns the tokenizer."""
    from transformers import (
        AutoTokenizer,
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.add_tokens([*SPECIALS], special_tokens=True)
    Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="bfloat16",
        vision_config=shape.vision_config(),
        text_config=shape.decoder_sizes(tokenizer) | {"vocab_size": VOCABULARY},
        **token_ids(tokenizer),
    ).save_pretrained(folder)
    save_processor(
        folder,
        shape,
        tokenizer,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
        CHAT_TEMPLATE.replace("<image>", IMAGE_MARKER),
    )
    return tokenizer


def copy_decoder(llava: Path, model: Any, tokenizer: Any) -> None:
    """Copy the decoder of a LLaVA into ``model``.

    Biases, which a LLaVA lacks, become zero. New tokens get the weights of ``<image>``, which no
    answer contains.
    """
    from safetensors.torch import load_file

    saved = load_file(llava / "model.safetensors")
    image, *new = tokenizer.convert_tokens_to_ids(["<image>", *SPECIALS])
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if ".visual." in name:
                continue
            if name.endswith(".bias"):
                weight.zero_()
                continue
            weight.copy_(saved[name])
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                weight[new] = saved[name][image].to(weight.dtype)
