"""Processing of videos for a pruned model. Mixins like those of ``processing``.

A *frame* is what the encoder computes as one image. How many tokens the frames of a video keep
depends on the ratio, their size and their number only; see ``plan.plan_video``. A frame's selection
depends on the prompt up to its end, so a prefix hit after any frame is exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import BatchFeature
from vllm.inputs import MultiModalHashes
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import (
    DictEmbeddingItems,
    EmbeddingItems,
    ImageSize,
    MultiModalDataItems,
    VideoProcessorItems,
)
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.utils.cache import LRUCache

from vitcop_vllm.models.layout import VideoLayout, layout_by_uuid
from vitcop_vllm.models.planned import PlannedVideo, planned_items
from vitcop_vllm.models.processing import (
    VIDEO_COUNTS_FIELD,
    PrunedProcessingInfo,
    PrunedProcessor,
    refuse_pruned_embeddings,
    video_row,
)
from vitcop_vllm.models.stage_one import ImageShape, VideoShape
from vitcop_vllm.pruning.amount import Amount
from vitcop_vllm.pruning.detail import dense_share_of_frames
from vitcop_vllm.pruning.grids import count_tokens, largest_grid
from vitcop_vllm.pruning.identity import MOST_EXPLAINED, explained_identifier
from vitcop_vllm.pruning.plan import VideoCounts, plan_video

_MAX_LAYOUTS = 1024
"""Maximum number of cached layouts of videos sent with a uuid, some 100 bytes each."""


def frames_and_metadata(videos: VideoProcessorItems, i: int) -> tuple[Any, Mapping[str, Any]]:
    """Frames of a video, and the loader's description of it, which is empty if there is none."""
    item = videos.get(i)
    if isinstance(item, tuple):
        return item
    # vLLM's parser keeps the two apart for models that do not need the description.
    described = videos.metadata[i] if isinstance(videos.metadata, list) else None
    return item, described or {}


def frame_size(frames: Any) -> ImageSize:
    """Width and height in pixels of a video's frames, as vLLM's loader returns them."""
    size: ImageSize = VideoProcessorItems([frames]).get_frame_size(0)
    return size


def times_of_frames(
    fps: float | None, indices: Sequence[int] | None, num_frames: int, joined: int = 1
) -> tuple[tuple[float, ...], ...] | None:
    """``VideoLayout.times``.

    Args:
        fps: Frames of the file in a second, if the loader knows.
        indices: Which frames of the file are read, if the loader says so.
        num_frames: How many are read.
        joined: How many of these the encoder joins into one.
    """
    if not fps or indices is None or len(indices) != num_frames:
        return None
    times = [index / fps for index in indices]
    return tuple(tuple(times[i : i + joined]) for i in range(0, num_frames, joined))


class VideoProcessingInfo(PrunedProcessingInfo):
    """A model's data that the processor needs for pruning images and videos."""

    modalities: tuple[str, ...] = ("image", "video")

    @cached_property
    def explained_layouts(self) -> LRUCache[str, VideoLayout]:
        """Layouts of the latest videos that are to be explained, by identifier."""
        return LRUCache(MOST_EXPLAINED)

    def video_layout(
        self,
        num_frames: int,
        width: int,
        height: int,
        metadata: Mapping[str, Any],
        processor_kwargs: Mapping[str, object],
    ) -> VideoLayout:
        """Frames and grids of a video.

        Args:
            num_frames: Frames that vLLM's loader read.
            width, height: Size of the frames in pixels.
            metadata: The loader's description of the video.
            processor_kwargs: The request's processor keywords.
        """
        raise NotImplementedError

    def video_counts(self, layout: VideoLayout, amount: Amount) -> VideoCounts:
        """Visual token counts of a video, whose request asks for ``amount``."""
        num_tokens = count_tokens(layout.grids)
        ratio = amount.ratio(num_tokens, layout.dense_share)
        return plan_video(self.settings, ratio, self._num_layers, num_tokens, layout.num_frames)

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Tokens of the largest image and video, which are unpruned; by vLLM."""
        if "video" not in mm_counts:
            return super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        this: Any = super(PrunedProcessingInfo, self)
        tokens: Mapping[str, int] = this.get_mm_max_tokens_per_item(seq_len, mm_counts)
        return tokens


class VideoProcessor(PrunedProcessor):
    """Shortens prompts to the visual tokens that Stage I keeps of images and videos.

    Attributes:
        video_pixels_field: Name of the field with the videos' pixels.
    """

    video_pixels_field = "pixel_values_videos"

    @cached_property
    def _video_layouts(self) -> LRUCache[str, VideoLayout]:
        """Layouts of videos that were sent with a uuid, by uuid."""
        return LRUCache(_MAX_LAYOUTS)

    def _videos(self, inputs: ProcessorInputs, amount: Amount) -> list[PlannedVideo]:
        videos = inputs.mm_data_items.get("video")
        if videos is None:
            return []
        kwargs = inputs.hf_processor_mm_kwargs
        if isinstance(videos, (EmbeddingItems, DictEmbeddingItems)):
            refuse_pruned_embeddings("video", kwargs)
            whole = [self._embedded_video(videos, i) for i in range(videos.get_count())]
            return [
                PlannedVideo(shape, VideoLayout(shape.num_frames, shape.frame.grids))
                for shape in whole
            ]
        assert isinstance(videos, VideoProcessorItems)
        uuids = (inputs.mm_uuid_items or {}).get("video")
        planned = []
        for i in range(videos.get_count()):
            layout = self._video_layout(videos, i, kwargs, amount, uuids[i] if uuids else None)
            first, others = self.info.video_counts(layout, amount)
            frame = ImageShape(others, layout.grids)
            different = None if first == others else first
            shape = VideoShape(frame, layout.num_frames, different, layout.tail)
            planned.append(PlannedVideo(shape, layout))
        return planned

    def _video_layout(
        self,
        videos: VideoProcessorItems,
        i: int,
        processor_kwargs: Mapping[str, object],
        amount: Amount,
        uuid: str | None,
    ) -> VideoLayout:
        layout: VideoLayout | None = None
        if videos.get(i) is not None:
            frames, metadata = frames_and_metadata(videos, i)
            num_frames = len(frames)
            if not num_frames:
                raise ValueError("the video has no frame that can be read")
            size = frame_size(frames)
            layout = self.info.video_layout(
                num_frames, size.width, size.height, metadata, processor_kwargs
            )
            if uuid is not None or amount.needs_detail:
                share = dense_share_of_frames(frames, largest_grid(layout.grids))
                layout = replace(layout, dense_share=share)
        return layout_by_uuid("video", self._video_layouts, uuid, layout)

    def _embedded_video(self, videos: Any, i: int) -> VideoShape:
        """Shape of a video whose embeddings the client computed."""
        raise NotImplementedError

    def _name_explained(
        self, request: str, inputs: ProcessorInputs, hashes: MultiModalHashes
    ) -> None:
        super()._name_explained(request, inputs, hashes)
        videos = inputs.mm_data_items.get("video")
        if not isinstance(videos, VideoProcessorItems):
            return
        planned = planned_items(inputs.hf_processor_mm_kwargs)
        first = len(planned.images)
        for i, name in enumerate(hashes["video"]):
            frames, _ = frames_and_metadata(videos, i)
            size = frame_size(frames)
            name = explained_identifier(request, first + i, (size.width, size.height), name)
            self.info.explained_layouts[name] = planned.videos[i].layout
            hashes["video"][i] = name

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        processed = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        if self.video_pixels_field in processed:
            videos = planned_items(hf_kwargs).videos
            rows = torch.tensor([video_row(video.shape) for video in videos])
            processed[VIDEO_COUNTS_FIELD] = rows
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        counts = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        return {**fields, VIDEO_COUNTS_FIELD: counts}
