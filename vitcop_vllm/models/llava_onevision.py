"""LLaVA-OneVision with visual token pruning, for images and videos.

SigLIP has no [CLS], so Stage I reads the attention that each token receives in its tile or frame.
vLLM's model scales the tiles of large images down, so that a token is an average over four patches.
It scales all frames of videos down to half of their rows and columns in the same way, and ends a
video with a mark, an embedding that is equal for all videos and belongs to no frame.
"""

from collections.abc import Mapping
from functools import cached_property
from math import isqrt
from typing import Any

import torch
from torch.nn.functional import unfold
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.torch_utils import async_tensor_h2d

from vitcop_vllm.models.layout import VideoLayout
from vitcop_vllm.models.pruned_encoder import ImageInputs
from vitcop_vllm.models.stage_one import VideoShape
from vitcop_vllm.models.tiles import TiledImage, TiledModel, TiledProcessingInfo, TokenSources
from vitcop_vllm.models.video_processing import (
    VideoProcessingInfo,
    VideoProcessor,
    times_of_frames,
)
from vitcop_vllm.pruning.grids import Grid

_FRAMES = "frames"
"""Field of frames that are encoded like images: (N, 3, height, width), one tile each."""


class PrunedLlavaOnevisionProcessingInfo(
    TiledProcessingInfo, VideoProcessingInfo, LlavaOnevisionProcessingInfo
):
    """vLLM's data of LLaVA-OneVision, with the grids of an image and of a frame."""

    def video_layout(
        self,
        num_frames: int,
        width: int,
        height: int,
        metadata: Mapping[str, Any],
        processor_kwargs: Mapping[str, object],
    ) -> VideoLayout:
        """Frames of any size are scaled to one tile, all that are read."""
        side = isqrt(self._get_num_frame_tokens(image_width=width, image_height=height))
        times = times_of_frames(metadata.get("fps"), metadata.get("frames_indices"), num_frames)
        return VideoLayout(num_frames, (Grid(side, side),), times=times, tail=1)

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        tokens = {
            "image": self.get_max_image_tokens(),
            "video": self.get_max_video_tokens(seq_len, mm_counts),
        }
        return {modality: tokens[modality] for modality in mm_counts}


class PrunedLlavaOnevisionProcessor(VideoProcessor, LlavaOnevisionMultiModalProcessor):
    """vLLM's processor, with as many placeholders per image and frame as Stage I keeps."""

    def _embedded_video(self, videos: Any, i: int) -> VideoShape:
        raise ValueError("vLLM's LLaVA-OneVision takes no embeddings of videos")


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaOnevisionProcessor,
    info=PrunedLlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevisionForConditionalGeneration(
    TiledModel, LlavaOnevisionForConditionalGeneration
):
    """vLLM's LLaVA-OneVision, which encodes the kept tokens of a pruned image or frame only."""

    has_cls = False

    def merge_tiles(
        self, tiles: torch.Tensor, height: int, width: int, row_mark: torch.Tensor
    ) -> torch.Tensor:
        this: Any = self
        merged: torch.Tensor = this._merge_image_patch_embeddings(
            torch.tensor([height, width]), tiles, image_newline=row_mark, strategy="spatial_unpad"
        )
        return merged

    # Videos.

    @property
    def video_tail(self) -> torch.Tensor:
        this: Any = self
        tail: torch.Tensor = this.image_newline[None]
        return tail

    @cached_property
    def _frame_sources(self) -> TokenSources:
        """Send the patches' places through vLLM's pooling, and see where they come out."""
        side = torch.arange(self._side, dtype=torch.float64)
        places = torch.cartesian_prod(side, side)
        this: Any = self
        return self._sources_at(this.apply_pooling(places[None])[0], tile_columns=1)

    def token_pixels(self, images: ImageInputs, number: int) -> torch.Tensor:
        # All pixels of the patches that a token is an average of.
        patch = self.config.vision_config.patch_size
        patches = unfold(images[_FRAMES][number, None], patch, stride=patch)[0].T
        sources = async_tensor_h2d(self._frame_sources.patches, device=patches.device)
        return patches[sources].flatten(1)

    def frames_as_images(self, videos: ImageInputs) -> ImageInputs:
        return {_FRAMES: torch.cat([*videos["pixel_values_videos"]])}

    def slice_images(self, inputs: ImageInputs, first: int, end: int) -> ImageInputs:
        if _FRAMES in inputs:
            return {_FRAMES: inputs[_FRAMES][first:end]}
        return super().slice_images(inputs, first, end)

    def pack_tiles(self, inputs: ImageInputs) -> tuple[list[TiledImage], torch.Tensor]:
        if _FRAMES not in inputs:
            return super().pack_tiles(inputs)
        frames = inputs[_FRAMES]
        return [TiledImage(number, 1, self._frame_sources) for number in range(len(frames))], frames

    def _embed_whole(self, kwargs: Mapping[str, Any]) -> MultiModalEmbeddings:
        this: Any = self
        if _FRAMES in kwargs:
            of_frames: torch.Tensor = this._video_pixels_to_features(
                this.vision_tower, kwargs[_FRAMES]
            )
            return of_frames
        # vLLM returns the embeddings of videos of different lengths with one dimension too many.
        return [embeddings.flatten(0, -2) for embeddings in super()._embed_whole(kwargs)]
