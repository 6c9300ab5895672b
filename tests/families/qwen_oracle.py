"""Qwen2.5-VL with three-segment pruning as one dense forward in plain PyTorch, float32.

Transformers' vision tower computes the input of its last block. This module computes that block,
every selection and the decoder with M-RoPE, from the method's description.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.engine.dense_oracle import DenseModel, Encoded
from tests.engine.requests import RequestSpec, sample_image, sample_video
from tests.pruning import oracle
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import PruningSettings

Grid = tuple[int, int]
"""Rows and columns of an image's visual tokens."""


@dataclass(frozen=True)
class Frame:
    """A frame of a video, as the encoder computes it: two frames of the file.

    Attributes:
        pixels: Patches of all frames of the video, as ``DenseQwen.processed`` has those of an
            image.
        grid: Of each frame.
        number, num_frames: Which frame it is, and of how many.
        time: Rotary position in time of its tokens, relative to where the frame begins.
        advance: Rotary position of what follows it, relative to where the frame begins.
        shown: Patches of all frames of the video, each pixel from 0 to 255.
    """

    pixels: torch.Tensor
    grid: Grid
    number: int = 0
    num_frames: int = 1
    time: int = 0
    advance: int = 0
    shown: torch.Tensor | None = None


class DenseQwen(DenseModel):
    """Qwen2.5-VL.

    Args:
        path: The checkpoint.
        boundaries: First layer after the shallow and after the deep boundary.
        density_scale: d_c as a share of the root mean square distance between features.
    """

    num_axes = 3

    def __init__(
        self, path: Path, boundaries: tuple[int, int], *, density_scale: float = 0.5, **options: Any
    ):
        super().__init__(path, boundaries, **options)
        self.density_scale = density_scale
        self.image_token = self.config.image_token_id
        self.video_token = self.config.video_token_id
        sections = self.config.text_config.rope_parameters["mrope_section"]
        self.axes = self.rotary_axes(sections)
        self.tower = self.load_tower(path)

    def load_tower(self, path: Path) -> Any:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        return model.model.visual.eval()

    def rotary_axes(self, sections: list[int]) -> list[int]:
        """Axis of each frequency: first those of time, then of row, then of column."""
        return [axis for axis, size in enumerate(sections) for _ in range(size)]

    # An image's grid.

    def processed(self, image: Image.Image) -> tuple[torch.Tensor, Grid]:
        """The patches' pixels, with the four patches of a visual token adjacent, and the grid."""
        inputs = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
        ((frames, height, width),) = inputs["image_grid_thw"].tolist()
        assert frames == 1
        return inputs["pixel_values"], (height // 2, width // 2)

    def visual_tokens(self, image: Any) -> int:
        rows, columns = self.frame_of(image).grid
        return rows * columns

    def frame_of(self, image: Any) -> Frame:
        """An image as a video's only frame; a frame as it is."""
        if isinstance(image, Frame):
            return image
        pixels, grid = self.processed(image)
        return Frame(pixels, grid, advance=max(grid))

    # A video's frames.

    def images(self, spec: RequestSpec) -> list[Any]:
        images: list[Any] = []
        for kind, seed in spec.media():
            images += [sample_image(seed)] if kind == "i" else self.frames_of(sample_video(seed))
        return images

    def frames_of(self, video: tuple[np.ndarray, dict[str, Any]]) -> list[Frame]:
        frames, metadata = video
        images = self.processor.image_processor
        processor = self.processor.video_processor
        inputs = processor(
            videos=[frames],
            do_sample_frames=False,
            # vLLM normalises images and frames in the same way. In published checkpoints both
            # processors have the same values.
            image_mean=images.image_mean,
            image_std=images.image_std,
            return_tensors="pt",
        )
        shown = processor(
            videos=[frames],
            do_sample_frames=False,
            do_rescale=False,
            do_normalize=False,
            return_tensors="pt",
        )["pixel_values_videos"]
        ((count, height, width),) = inputs["video_grid_thw"].tolist()
        grid = height // 2, width // 2
        seconds = 2 * metadata["total_num_frames"] / (len(frames) * metadata["fps"])
        times = self.times(count, seconds, grid)
        return [
            Frame(inputs["pixel_values_videos"], grid, i, count, time, advance, shown)
            for i, (time, advance) in enumerate(zip(*times, strict=True))
        ]

    def times(self, count: int, seconds: float, grid: Grid) -> tuple[list[int], list[int]]:
        """``Frame.time`` and ``Frame.advance`` of each frame.

        Args:
            count: Number of frames; no text stands between them.
            seconds: Seconds between them.
            grid: Of each frame.
        """
        of_second = self.config.vision_config.tokens_per_second
        times = [int(i * seconds * of_second) for i in range(count)]
        return times, [0] * (count - 1) + [max(times[-1] + 1, *grid)]

    def plan(self, settings: PruningSettings, ratio: float, image: Any) -> VisualTokenCounts:
        frame = self.frame_of(image)
        tokens = self.visual_tokens(frame)
        ratio = self.ratio_of_frame(ratio, tokens, frame.number, frame.num_frames)
        return super().plan(settings, ratio, image)

    # The vision tower.

    def encode(self, image: Any, counts: VisualTokenCounts) -> Encoded:
        frame = self.frame_of(image)
        rows, columns = grid = frame.grid
        assert counts.encoder == rows * columns
        x = self.last_block_input(frame)
        name = f"model.visual.blocks.{self.config.vision_config.depth - 1}"
        query, key, value = self.query_key_value(name, x)
        turned_query, turned_key = (self.turn(t, grid) for t in (query, key))
        saliency = attention_received(turned_query, turned_key)
        kept = self.choose_patches(saliency, counts.stages[0], self.changed_in(frame))
        labels = []
        if counts.centres:
            features = key.flatten(2).mean(1)[kept].numpy()
            labels = oracle.labels(
                features,
                oracle.positions(kept, rows, columns),
                counts.centres,
                density_scale=self.density_scale * root_mean_square_distance(features),
            )
        x = self.rest_of_block(name, x[kept], turned_query[kept], turned_key, value)
        offsets = [(frame.time, token // columns, token % columns) for token in kept]
        return Encoded(self.merge_patches(x), labels, offsets, frame.advance)

    def changed_in(self, frame: Frame) -> list[bool]:
        """Whether each token shows something else than the frame before."""
        if not self.compares_frames or not frame.number:
            return [True] * self.visual_tokens(frame)
        assert frame.shown is not None
        shown = frame.shown.unflatten(0, (frame.num_frames, -1, 4)).flatten(2).numpy()
        return oracle.shows_change(shown[frame.number - 1], shown[frame.number])

    def choose_patches(self, saliency: torch.Tensor, n1: int, changed: list[bool]) -> list[int]:
        return oracle.largest_of_changed(saliency.tolist(), changed, n1)

    def last_block_input(self, frame: Frame) -> torch.Tensor:
        """(V, 4, C), tokens row by row. The tower computes the whole video."""
        captured = []
        hook = self.tower.blocks[-1].register_forward_pre_hook(
            lambda _, inputs: captured.append(inputs[0])
        )
        rows, columns = frame.grid
        with torch.no_grad():
            self.tower(frame.pixels, torch.tensor([[frame.num_frames, 2 * rows, 2 * columns]]))
        hook.remove()
        by_window = captured[0].unflatten(0, (frame.num_frames, -1, 4))[frame.number]
        x = torch.empty_like(by_window)
        x[self.window_order(frame.grid)] = by_window
        return x

    def window_order(self, grid: Grid) -> list[int]:
        """Token indices in the tower's order: window by window, row by row inside a window."""
        config = self.config.vision_config
        side = config.window_size // config.patch_size // 2
        rows, columns = grid
        return [
            row * columns + column
            for top in range(0, rows, side)
            for left in range(0, columns, side)
            for row in range(top, min(top + side, rows))
            for column in range(left, min(left + side, columns))
        ]

    def query_key_value(self, name: str, x: torch.Tensor) -> list[torch.Tensor]:
        """Query, key and value, each (V, 4, heads, D), before the rotary embedding."""
        y = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x))
        heads = self.config.vision_config.num_heads
        return [t.unflatten(-1, (heads, -1)) for t in y.chunk(3, dim=-1)]

    @staticmethod
    def turn(x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Rotary embedding: a quarter of the head's width by row, a quarter by column."""
        rows, columns = grid
        quarter = x.shape[-1] // 4
        frequencies = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
        angles = [
            torch.cat(((2 * row + down) * frequencies, (2 * column + right) * frequencies))
            for row in range(rows)
            for column in range(columns)
            for down in (0, 1)
            for right in (0, 1)
        ]
        angle = torch.stack(angles).view(-1, 4, 1, 2 * quarter)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def rest_of_block(self, name, x, query, key, value):
        """The block's output for the kept rows ``x`` and ``query``, which attend to all keys."""
        scores = torch.einsum("qphd,krhd->hqpkr", query, key) * query.shape[-1] ** -0.5
        attention = scores.flatten(-2).softmax(-1).unflatten(-1, key.shape[:2])
        y = torch.einsum("hqpkr,krhd->qphd", attention, value).flatten(2)
        x = x + self.linear(f"{name}.attn.proj", y)
        return x + self.block_mlp(name, self.norm(f"{name}.norm2", x))

    def block_mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self.linear(f"{name}.mlp.gate_proj", x))
        return self.linear(f"{name}.mlp.down_proj", gate * self.linear(f"{name}.mlp.up_proj", x))

    def merge_patches(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 4, C) -> (n, H)."""
        y = self.norm("model.visual.merger.ln_q", x).flatten(1)
        y = F.gelu(self.linear("model.visual.merger.mlp.0", y))
        return self.linear("model.visual.merger.mlp.2", y)


def attention_received(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(V, 4, heads, D) twice -> (V,): mean attention that each token receives from the image.

    A token's query is the mean over its four patches.
    """
    mean = query.mean(1)
    received = torch.zeros(key.shape[:2])
    for head in range(key.shape[2]):
        scores = torch.einsum("qd,krd->qkr", mean[:, head], key[:, :, head])
        weights = (scores * key.shape[-1] ** -0.5).flatten(1).softmax(-1)
        received += weights.mean(0).view(received.shape)
    return received.mean(1)


def root_mean_square_distance(features: np.ndarray) -> float:
    """(n, C) -> root mean square distance over all ordered pairs, self-pairs included."""
    wide = features.astype(np.float64)
    return float(np.sqrt(np.mean([((wide - row) ** 2).sum(-1) for row in wide])))
