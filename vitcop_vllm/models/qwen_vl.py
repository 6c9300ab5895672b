"""What the families of Qwen-VL share. Each is pruned with these mixins of vLLM's classes.

The encoder has no [CLS]. Stage I reads the attention that each token receives in the last block,
which attends over the whole image. A visual token is a square of patches, so its query, features
and attention are averages over its patches.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from math import isqrt, prod
from typing import Any

import torch
from torch import nn
from transformers.image_utils import SizeDict
from transformers.video_utils import VideoMetadata
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.utils.math_utils import cdiv

from vitcop_vllm.models.layout import ImageLayout, VideoLayout
from vitcop_vllm.models.mrope import MRoPEImage, mrope_positions
from vitcop_vllm.models.packed_tower import (
    AttentionInputs,
    PackedImage,
    SelectRows,
    kept_places,
    lengths_of_images,
    split_by_shape,
)
from vitcop_vllm.models.processing import shape_of_item, without_pruning_keys
from vitcop_vllm.models.pruned_encoder import ImageInputs, PrunedEncoder
from vitcop_vllm.models.stage_one import Groups, ImageShape, VideoShape
from vitcop_vllm.models.video_processing import (
    VideoProcessingInfo,
    VideoProcessor,
    times_of_frames,
)
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.identity import spans_in_prompt
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.views import EncoderView


class QwenProcessingInfo(VideoProcessingInfo):
    """Images and frames of any size, scaled to a whole number of visual tokens per side."""

    def layout(
        self, width: int, height: int, processor_kwargs: Mapping[str, object] | None = None
    ) -> ImageLayout:
        kwargs = without_pruning_keys(processor_kwargs or {})
        this: Any = self
        size, _ = this._get_vision_info(
            image_width=width,
            image_height=height,
            image_processor=this.get_image_processor(**kwargs),
            mm_kwargs=kwargs,
        )
        side = self._token_side()
        box = (0.0, 0.0, float(width), float(height))
        return ImageLayout((Grid(size.height // side, size.width // side),), box)

    def video_layout(
        self,
        num_frames: int,
        width: int,
        height: int,
        metadata: Mapping[str, Any],
        processor_kwargs: Mapping[str, object],
    ) -> VideoLayout:
        kwargs = without_pruning_keys(processor_kwargs)
        this: Any = self
        processor = this.get_hf_processor(**kwargs).video_processor
        options = dict(this._merge_and_resolve_mm_processor_kwargs(kwargs).get("videos_kwargs", {}))
        size = this._get_vision_size(options, default_size=processor.size)
        options |= {"size": SizeDict(**size)}
        options.setdefault("do_sample_frames", self._samples_frames(processor, metadata))
        if "num_frames" in options:
            options.setdefault("fps", None)  # the processor refuses both
        for name in processor.valid_kwargs.__annotations__:
            options.setdefault(name, getattr(processor, name, None))
        described = VideoMetadata(**{k: v for k, v in metadata.items() if k != "do_sample_frames"})
        if options["do_sample_frames"]:
            # The loader read all frames, and the processor takes some of them.
            indices = processor.sample_frames(described, **options)
            described.frames_indices = indices.tolist()
            num_frames = len(indices)
        if options["do_resize"]:
            # The processor's own code, on a tensor without data.
            resized = processor.resize(
                videos=torch.empty((1, num_frames, 3, height, width), device="meta"),
                factor=options["patch_size"] * options["merge_size"],
                temporal_factor=options["temporal_patch_size"],
                **{name: options[name] for name in ("size", "resample", "cap_pixels_per_frame")},
            )
            height, width = resized.shape[-2:]
        side = self._token_side()
        grid = Grid(height // side, width // side)
        joined = options["temporal_patch_size"]
        times = times_of_frames(described.fps, described.frames_indices, num_frames, joined)
        num_frames = cdiv(num_frames, joined)
        num_positions = self._num_positions(num_frames, grid, joined / described.sampled_fps)
        return VideoLayout(num_frames, (grid,), num_positions, times)

    def _samples_frames(self, processor: Any, metadata: Mapping[str, Any]) -> bool:
        """Whether the processor samples a video's frames, if the operator does not say so."""
        return bool(processor.do_sample_frames)

    def _num_positions(self, num_frames: int, grid: Grid, seconds: float) -> int:
        """Rotary positions that a video's frames take.

        Args:
            num_frames: Number of frames.
            grid: Of each frame.
            seconds: Seconds between frames.
        """
        raise NotImplementedError

    def dummy_size(self, max_tokens: int) -> tuple[int, int] | None:
        this: Any = self
        if this.get_max_image_tokens() <= max_tokens:
            return None
        side = isqrt(max_tokens) * self._token_side()
        return side, side

    def _token_side(self) -> int:
        """Side length of a visual token, in pixels."""
        vision = self._config.vision_config
        side: int = vision.patch_size * vision.spatial_merge_size
        return side


class QwenProcessor(VideoProcessor):
    """vLLM's processor, with as many placeholders per image and frame as Stage I keeps."""

    def _embedded_shape(self, images: Any, i: int) -> ImageShape:
        return self._whole(images.get(i)["image_grid_thw"]).frame

    def _embedded_video(self, videos: Any, i: int) -> VideoShape:
        return self._whole(videos.get(i)["video_grid_thw"])

    def _whole(self, grid_thw: torch.Tensor) -> VideoShape:
        """Unpruned shape of a grid of patches."""
        num_frames, height, width = grid_thw.tolist()
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        grid = Grid(height // merge, width // merge)
        counts = VisualTokenCounts.unpruned(grid.num_tokens)
        return VideoShape(ImageShape(counts, (grid,)), num_frames)


class PrunedQwen(PrunedEncoder):
    """A Qwen-VL. Kept tokens have the rotary positions of the unpruned image."""

    visual: Any

    # What a family adds.

    def token_order(self, grid: Sequence[int]) -> torch.Tensor:
        """(V,) int64: index in the tower of each token of an image's grid, from the image's first.

        By default, the tower computes tokens in the grid's order.

        Args:
            grid: Time, height and width of the image in patches.
        """
        num_tokens = prod(grid) // self.visual.spatial_merge_unit
        return torch.arange(num_tokens, device=self.visual.device)

    def run_tower(
        self,
        pixels: torch.Tensor,
        grids: Sequence[Sequence[int]],
        num_kept: int,
        select_rows: SelectRows,
    ) -> torch.Tensor:
        """(N, columns) embeddings of the kept tokens.

        Args:
            pixels: (S, ...) patches of all images.
            grids: Time, height and width of each image in patches.
            num_kept: N.
            select_rows: Called in the last block, before attention; returns the patches' rows in
                the order of the embeddings, N * patches per token. The block's other rows are
                not computed.
        """
        raise NotImplementedError

    def frames_in_prompt(
        self, frames: list[MRoPEImage], data: Mapping[str, Any]
    ) -> list[MRoPEImage]:
        """The frames of a video, each at its position in time.

        Args:
            frames: The frames at time 0.
            data: Fields of the processed video.
        """
        return frames

    # What all families of Qwen-VL do.

    def frames_as_images(self, videos: ImageInputs) -> ImageInputs:
        grids = videos["video_grid_thw"]
        frames = grids.repeat_interleave(grids[:, 0], dim=0)
        frames[:, 0] = 1
        return {"pixel_values": videos["pixel_values_videos"], "image_grid_thw": frames}

    def slice_images(self, inputs: ImageInputs, first: int, end: int) -> ImageInputs:
        grids = inputs["image_grid_thw"]
        before, within = (int(part.prod(-1).sum()) for part in (grids[:first], grids[first:end]))
        return {
            "pixel_values": inputs["pixel_values"][before : before + within],
            "image_grid_thw": grids[first:end],
        }

    def token_pixels(self, images: ImageInputs, number: int) -> torch.Tensor:
        # The patches of a token follow each other, and the tokens are in the grid's order.
        pixels = self.slice_images(images, number, number + 1)["pixel_values"]
        return pixels.unflatten(0, (-1, self.visual.spatial_merge_unit)).flatten(1)

    def encode_kept(
        self, inputs: ImageInputs, groups: Groups, keep: Any
    ) -> Mapping[ImageShape, torch.Tensor]:
        pixels, grids = inputs["pixel_values"], [*map(tuple, inputs["image_grid_thw"].tolist())]
        patches = self.visual.spatial_merge_unit
        images = self._packed(grids)

        def select_rows(last: AttentionInputs) -> torch.Tensor:
            kept = keep(partial(self._view_of, last, pixels, images))
            rows = kept_places(images, groups, kept)[:, None] * patches
            return (rows + torch.arange(patches, device=rows.device)).flatten()

        num_kept = sum(lengths_of_images(groups))
        return split_by_shape(self.run_tower(pixels, grids, num_kept, select_rows), groups)

    def _packed(self, grids: Sequence[tuple[int, ...]]) -> list[PackedImage]:
        orders = {grid: self.token_order(grid) for grid in {*grids}}  # a video's frames share one
        firsts = accumulate((len(orders[grid]) for grid in grids), initial=0)
        return [
            PackedImage(first, orders[grid]) for grid, first in zip(grids, firsts, strict=False)
        ]

    def _view_of(
        self,
        last: AttentionInputs,
        pixels: torch.Tensor,
        images: Sequence[PackedImage],
        shape: ImageShape,
        numbers: Sequence[int],
    ) -> EncoderView:
        """The tower's last block on the images ``numbers``."""
        patches = self.visual.spatial_merge_unit
        attention = self.visual.blocks[-1].attn

        def tokens_of(rows: torch.Tensor, number: int) -> torch.Tensor:
            """(S, ...) rows of all images to (V, P, ...) rows of one image, in grid order."""
            image = images[number]
            first = image.first * patches
            image_rows = rows[first : first + len(image.places) * patches]
            return image_rows.unflatten(0, (-1, patches))[image.places]

        def all_tokens(rows: torch.Tensor) -> torch.Tensor:
            return torch.stack([tokens_of(rows, number) for number in numbers])

        firsts = [images[number].first * patches for number in numbers]
        length = shape.counts.encoder * patches
        return self.view_of_layer(
            attention.tp_size,
            queries=lambda: all_tokens(last.query).float().mean(dim=2),
            keys=all_tokens(last.key).flatten(1, 2),
            cls_query=None,
            to_tokens=lambda of_patches: of_patches.unflatten(1, (-1, patches)).mean(dim=2),
            features=lambda: all_tokens(last.raw_key).float().mean(dim=2),
            scale=attention.attn.scale,
            grids=shape.grids,
            pixels=torch.stack([pixels[first : first + length] for first in firsts]),
        )

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        images: list[MRoPEImage] = []
        is_embedded = False
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            video = shape_of_item(feature.data)
            if video is None:
                is_embedded = True
                continue
            (grid,) = video.frame.grids
            frames = [
                MRoPEImage(
                    span.offset,
                    span.counts.stages[0],
                    grid.rows,
                    grid.columns,
                    is_whole=not self.selector.prunes_encoder or not span.counts.is_pruned,
                )
                for span in spans_in_prompt(feature.identifier, feature.mm_position)
            ]
            if feature.modality == "video":
                frames = self.frames_in_prompt(frames, feature.data)
            images += frames
        if all(image.is_whole for image in images):
            this: Any = super()
            positions: tuple[torch.Tensor, int] = this.get_mrope_input_positions(
                input_tokens, mm_features
            )
            return positions
        assert not is_embedded, "image embeddings cannot be pruned"
        return mrope_positions(len(input_tokens), images)


@contextmanager
def attention_of_kept_rows(attention: Any, select_rows: SelectRows) -> Iterator[list[torch.Tensor]]:
    """Report a block's attention inputs, and then output only the kept rows of its attention.

    Args:
        attention: vLLM's ``Qwen2_5_VisionAttention``: ``qkv``, ``attn`` and ``proj``.
        select_rows: Called before attention. Its rows are output, in this order.

    Yields:
        A list that then holds these rows.
    """
    raw_key = torch.empty(0)
    rows: list[torch.Tensor] = []

    def after_qkv(_: nn.Module, __: object, output: Any) -> None:
        nonlocal raw_key
        raw_key = output[0].squeeze(1).chunk(3, dim=-1)[1]

    def before_attention(_: nn.Module, __: object, inputs: Mapping[str, Any]) -> None:
        rows.append(select_rows(AttentionInputs(inputs["query"][0], inputs["key"][0], raw_key)))

    def before_proj(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return inputs[0][rows[0]]

    hooks = (
        attention.qkv.register_forward_hook(after_qkv),
        attention.attn.register_forward_pre_hook(before_attention, with_kwargs=True),
        attention.proj.register_forward_pre_hook(before_proj),
    )
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()
