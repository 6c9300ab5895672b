"""Processing of prompts and images for a pruned model.

A prompt has one placeholder for each visual token that Stage I keeps, and an image's identifier
carries its visual token counts.

The classes are mixins for vLLM's classes of a model family. A family adds ``layout``: the grids
of visual tokens of an image of a given size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from http import HTTPStatus
from itertools import accumulate, chain, compress
from typing import Any

import torch
from transformers import BatchFeature
from vllm.exceptions import GracefulHTTPError
from vllm.inputs import MultiModalHashes, MultiModalInput
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import (
    DictEmbeddingItems,
    EmbeddingItems,
    ImageProcessorItems,
    MultiModalDataItems,
)
from vllm.multimodal.processing import PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.utils.cache import LRUCache

from vitcop_vllm.engine.config import pruning_settings_of, span_limit_of
from vitcop_vllm.engine.families import FAMILIES
from vitcop_vllm.engine.metrics import COUNTS_MISMATCHES
from vitcop_vllm.models.layout import ImageLayout, layout_by_uuid
from vitcop_vllm.models.mrope import MRoPEImage, positions_beyond_tokens
from vitcop_vllm.models.planned import PLANNED_KEY, PlannedItems, PlannedVideo, planned_items
from vitcop_vllm.models.stage_one import ImageShape, VideoShape
from vitcop_vllm.pruning.amount import AMOUNT_KEYS, Amount, amount_of
from vitcop_vllm.pruning.detail import Picture, dense_share
from vitcop_vllm.pruning.grids import Grid, largest_grid
from vitcop_vllm.pruning.identity import (
    EXPLAIN_KEY,
    MOST_EXPLAINED,
    CountsMismatchError,
    explained_identifier,
    spans_in_prompt,
    tag_identifier,
)
from vitcop_vllm.pruning.plan import VisualTokenCounts, plan_counts
from vitcop_vllm.pruning.settings import RATIO_KEY, PruningSettings

logger = init_logger(f"vllm.{__name__}")

COUNTS_FIELD = "visual_token_counts"
"""Field of a processed image with its counts and grids, for the encoder; see :func:`shape_row`."""

VIDEO_COUNTS_FIELD = "video_token_counts"
"""Field of a processed video with its frames' counts and grids; see :func:`video_row`."""

_MAX_LAYOUTS = 8192
"""Maximum number of cached layouts of images sent with a uuid, some 100 bytes each."""


class MisprocessedImageError(GracefulHTTPError, CountsMismatchError):
    """A fault of the processor. vLLM's server answers the request with status 503."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"the server processed an image of this request wrongly: {message}",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )


_MOST_GRIDS = 2
"""Most grids of an image. Rows of :func:`shape_row` are equally long, because vLLM stacks them."""

_NO_GRID = Grid(0, 0)


def _counts_row(counts: VisualTokenCounts) -> list[int]:
    return [counts.encoder, counts.centres, *counts.stages]


def _counts_of_row(row: Sequence[int]) -> VisualTokenCounts:
    encoder, centres, n1, n2, n3 = row
    return VisualTokenCounts(encoder, centres, (n1, n2, n3))


def shape_row(shape: ImageShape) -> list[int]:
    """A shape as integers: V, K, n1, n2, n3; then rows, columns and row marks of each grid."""
    assert len(shape.grids) <= _MOST_GRIDS
    no_grids = [_NO_GRID] * (_MOST_GRIDS - len(shape.grids))
    grids = map(int, chain(*shape.grids, *no_grids))
    return [*_counts_row(shape.counts), *grids]


def shape_of_row(row: Sequence[int]) -> ImageShape:
    """The shape of a row of :func:`shape_row`."""
    grids = tuple(
        Grid(rows, columns, bool(marks))
        for rows, columns, marks in zip(*[iter(row[5:])] * 3, strict=True)
    )
    grids = tuple(grid for grid in grids if grid != _NO_GRID)
    return ImageShape(_counts_of_row(row[:5]), grids)


def video_row(video: VideoShape) -> list[int]:
    """A video's shape as integers: frames, tail, first frame's counts, the row of a frame."""
    first = video.first or video.frame.counts
    return [video.num_frames, video.tail, *_counts_row(first), *shape_row(video.frame)]


def video_of_row(row: Sequence[int]) -> VideoShape:
    """The shape of a row of :func:`video_row`."""
    first, frame = _counts_of_row(row[2:7]), shape_of_row(row[7:])
    return VideoShape(frame, row[0], None if first == frame.counts else first, row[1])


def shape_of_item(item: Any) -> VideoShape | None:
    """Shape of a processed item, an image as a video of one frame; ``None`` for embeddings."""
    if item is not None and COUNTS_FIELD in item:
        return VideoShape(shape_of_row(item[COUNTS_FIELD].data.tolist()), 1)
    if item is not None and VIDEO_COUNTS_FIELD in item:
        return video_of_row(item[VIDEO_COUNTS_FIELD].data.tolist())
    return None


def without_pruning_keys(processor_kwargs: Mapping[str, object]) -> dict[str, object]:
    """The processor keywords for Hugging Face's processor, without those of this plugin."""
    ours = (*AMOUNT_KEYS, EXPLAIN_KEY, PLANNED_KEY)
    return {k: v for k, v in processor_kwargs.items() if k not in ours}


def refuse_pruned_embeddings(what: str, processor_kwargs: Mapping[str, object]) -> None:
    """Refuse a ratio above 0 for embeddings that a client computed.

    Args:
        what: ``image`` or ``video``.
        processor_kwargs: The request's processor keywords.

    Raises:
        ValueError: If the ratio is above 0.
    """
    if any(processor_kwargs.get(key) for key in AMOUNT_KEYS):
        raise ValueError(
            f"{what} embeddings cannot be pruned, because Stage I needs the encoder's "
            f"attention; send the {what} itself, or set {RATIO_KEY} to 0"
        )


class PrunedProcessingInfo:
    """A model's data that the processor needs for pruning. A mixin of vLLM's ``ProcessingInfo``.

    Attributes:
        position_slack: Length of the rotary table as a multiple of ``max_position_embeddings``,
            for models with M-RoPE; ``None`` for models without M-RoPE.
        modalities: What can be pruned. A request with anything else is refused.
    """

    position_slack: int | None = None
    modalities: tuple[str, ...] = ("image",)

    def layout(
        self, width: int, height: int, processor_kwargs: Mapping[str, object] | None = None
    ) -> ImageLayout:
        """Grids of visual tokens and visible part of an image.

        Args:
            width, height: Size of the image as it was sent, in pixels.
            processor_kwargs: The request's processor keywords.
        """
        raise NotImplementedError

    def detailed_layout(
        self,
        image: Picture,
        width: int,
        height: int,
        processor_kwargs: Mapping[str, object] | None = None,
    ) -> ImageLayout:
        """:meth:`layout` of an image, with its share of dense patches."""
        layout = self.layout(width, height, processor_kwargs)
        return replace(layout, dense_share=dense_share(image, largest_grid(layout.grids)))

    def dummy_size(self, max_tokens: int) -> tuple[int, int] | None:
        """Width and height of a dummy image with at most ``max_tokens`` visual tokens.

        ``None`` if the largest image has no more tokens, or if all images have equally many.
        """
        return None

    @property
    def reads_cls(self) -> bool:
        """Whether Stage I may read the attention of [CLS]. If not, it reads that received."""
        this: Any = self
        has_cls = FAMILIES[this.ctx.model_config.architecture].has_cls
        return has_cls and self.settings.encoder_signal != "received"

    @property
    def _config(self) -> Any:
        this: Any = self
        return this.get_hf_config()

    @cached_property
    def settings(self) -> PruningSettings:
        return pruning_settings_of(self._config)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """vLLM's limits of what can be pruned."""
        limits: Mapping[str, int | None] = super().get_supported_mm_limits()  # type: ignore[misc]
        return {modality: limits[modality] for modality in self.modalities}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Tokens of the largest image that a request may have, which is unpruned."""
        this: Any = self
        return {"image": this.get_max_image_tokens()}

    def counts(
        self, num_image_tokens: int, amount: Amount, dense_share: float | None = None
    ) -> VisualTokenCounts:
        """Visual token counts of one image.

        Args:
            num_image_tokens: V, its visual tokens without pruning.
            amount: What its request asks for.
            dense_share: Its ``ImageLayout.dense_share``.
        """
        ratio = amount.ratio(num_image_tokens, dense_share)
        return plan_counts(self.settings, ratio, self._num_layers, num_image_tokens)

    @property
    def _num_layers(self) -> int:
        """L, decoder layers."""
        layers: int = self._config.get_text_config().num_hidden_layers
        return layers

    @property
    def span_limit(self) -> int:
        """Most tokens of a pruned image: a step computes all of it."""
        return span_limit_of(self._config)

    def check_admissible(self, planned: PlannedItems) -> None:
        """Refuse images and videos that the engine cannot compute.

        Raises:
            ValueError: If a pruned image or frame does not fit into one step, or if the prompt's
                positions could exceed the rotary table.
        """
        limit = self.span_limit
        spans = [("an image", shape) for shape in planned.images]
        spans += [("a frame", frame) for video, _ in planned.videos for frame in {*video.frames}]
        for one, (counts, _) in spans:
            if counts.is_pruned and counts.stages[0] > limit:
                raise ValueError(
                    f"a pruned image is computed in one step, which holds {limit} tokens, but "
                    f"{one} of this request keeps {counts.stages[0]} in Stage I; set a higher "
                    "pruning ratio or ratio 0, send a smaller image, or have the operator raise "
                    "--max-num-batched-tokens"
                )
        if self.position_slack is None:
            return
        places = [
            MRoPEImage(0, counts.stages[0], grid.rows, grid.columns, False)
            for counts, grids in planned.images
            for grid in grids
        ]
        for video, layout in planned.videos:
            advance = layout.num_positions
            places.append(MRoPEImage(0, video.num_kept, 0, 0, False, advance=advance))
        beyond = positions_beyond_tokens(places)
        this: Any = self
        table = self.position_slack * self._config.get_text_config().max_position_embeddings
        if this.ctx.model_config.max_model_len + beyond > table:
            raise ValueError(
                f"rotary positions of this prompt could exceed the model's largest, {table - 1}, "
                f"because its images take {beyond} more positions than tokens; set a lower pruning "
                "ratio or send less elongated images"
            )


class PrunedProcessor:
    """Shortens prompts to the visual tokens that Stage I keeps. A mixin of vLLM's processor.

    Attributes:
        pixels_field: Name of the field with the images' pixels.
    """

    info: Any
    pixels_field = "pixel_values"

    @cached_property
    def _layouts(self) -> LRUCache[str, ImageLayout]:
        """Layouts of images that were sent with a uuid, by uuid.

        A client may send such an image again without its data.
        """
        return LRUCache(_MAX_LAYOUTS)

    def _plan(self, inputs: ProcessorInputs) -> PlannedItems:
        """Counts of a request's images and videos.

        Raises:
            ValueError: If the request cannot be computed.
        """
        amount = amount_of(self.info.settings, inputs.hf_processor_mm_kwargs)
        planned = PlannedItems(self._images(inputs, amount), self._videos(inputs, amount))
        self.info.check_admissible(planned)
        return planned

    def _images(self, inputs: ProcessorInputs, amount: Amount) -> list[ImageShape]:
        images = inputs.mm_data_items.get("image")
        if images is None:
            return []
        kwargs = inputs.hf_processor_mm_kwargs
        if isinstance(images, (EmbeddingItems, DictEmbeddingItems)):
            refuse_pruned_embeddings("image", kwargs)
            return [self._embedded_shape(images, i) for i in range(images.get_count())]
        assert isinstance(images, ImageProcessorItems)
        uuids = (inputs.mm_uuid_items or {}).get("image")
        shapes = []
        for i in range(images.get_count()):
            layout = self._layout(images, i, kwargs, amount, uuids[i] if uuids else None)
            counts = self.info.counts(layout.num_tokens, amount, layout.dense_share)
            shapes.append(ImageShape(counts, layout.grids))
        return shapes

    def _videos(self, inputs: ProcessorInputs, amount: Amount) -> list[PlannedVideo]:
        return []

    def _layout(
        self,
        images: ImageProcessorItems,
        i: int,
        processor_kwargs: Mapping[str, object],
        amount: Amount,
        uuid: str | None,
    ) -> ImageLayout:
        layout: ImageLayout | None = None
        if images.get(i) is not None:
            size = images.get_image_size(i)
            if uuid is not None or amount.needs_detail:
                layout = self.info.detailed_layout(images.get(i), *size, processor_kwargs)
            else:
                layout = self.info.layout(*size, processor_kwargs)
        return layout_by_uuid("image", self._layouts, uuid, layout)

    def _embedded_shape(self, images: Any, i: int) -> ImageShape:
        """Shape of an image whose embeddings the client computed."""
        num_tokens = images.get_feature_size(i)
        return ImageShape(VisualTokenCounts.unpruned(num_tokens), (Grid(1, num_tokens),))

    def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> MultiModalInput:
        """vLLM's processed prompt.

        Raises:
            ValueError: If the request cannot be computed.
            MisprocessedImageError: If an identifier contradicts its placeholders.
                An error here fails one request. An error in the engine would fail all requests.
        """
        ours = {**inputs.hf_processor_mm_kwargs, PLANNED_KEY: self._plan(inputs)}
        planned = replace(inputs, hf_processor_mm_kwargs=ours)
        processed: MultiModalInput = super().apply(planned, *args, **kwargs)  # type: ignore[misc]
        try:
            for modality, names in processed["mm_hashes"].items():
                places = processed["mm_placeholders"].get(modality, ())
                for name, place in zip(names, places, strict=True):
                    spans_in_prompt(name, place)
        except CountsMismatchError as error:
            COUNTS_MISMATCHES.labels("processor").inc()
            logger.error("Request refused: %s", error)
            raise MisprocessedImageError(str(error)) from None
        return processed

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """Inputs for memory profiling: unpruned images."""
        inputs: ProcessorInputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        return replace(inputs, hf_processor_mm_kwargs={RATIO_KEY: 0})

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> MultiModalHashes:
        kwargs = inputs.hf_processor_mm_kwargs
        shapes, videos = planned_items(kwargs)
        # Hash without the ratio: it would separate images of equal counts. The counts are appended.
        plain = replace(inputs, hf_processor_mm_kwargs=without_pruning_keys(kwargs))
        hashes: MultiModalHashes = super()._get_mm_hashes(plain)  # type: ignore[misc]
        if "image" in hashes:
            hashes["image"] = [
                tag_identifier(mm_hash, shape.counts)
                for mm_hash, shape in zip(hashes["image"], shapes, strict=True)
            ]
        if "video" in hashes:
            hashes["video"] = [
                tag_identifier(
                    mm_hash, video.frame.counts, video.num_frames, video.first, video.tail
                )
                for mm_hash, (video, _) in zip(hashes["video"], videos, strict=True)
            ]
        if (request := kwargs.get(EXPLAIN_KEY)) is not None:
            num_records = len(shapes) + sum(video.num_frames for video, _ in videos)
            if num_records > MOST_EXPLAINED:
                raise ValueError(
                    f"an explanation is of at most {MOST_EXPLAINED} images and frames of videos, "
                    f"and this request has {num_records}: send fewer or a shorter video"
                )
            self._name_explained(str(request), inputs, hashes)
        return hashes

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, Sequence[bool]]
    ) -> Mapping[str, object]:
        kwargs = inputs.hf_processor_mm_kwargs
        plain = replace(inputs, hf_processor_mm_kwargs=without_pruning_keys(kwargs))
        missing: Mapping[str, object] = super()._get_cache_missing_processor_kwargs(  # type: ignore[misc]
            plain, mm_is_cached
        )
        return {**missing, PLANNED_KEY: planned_items(kwargs).missing(mm_is_cached)}

    def _name_explained(
        self, request: str, inputs: ProcessorInputs, hashes: MultiModalHashes
    ) -> None:
        """Give images and videos that are to be explained their unique names in ``hashes``."""
        images = inputs.mm_data_items.get("image")
        if isinstance(images, ImageProcessorItems):
            hashes["image"] = [
                explained_identifier(request, i, images.get_image_size(i), name)
                for i, name in enumerate(hashes["image"])
            ]

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        plain = without_pruning_keys(hf_kwargs)
        processed: BatchFeature = super()._apply_hf_processor_main(mm_items, plain)  # type: ignore[misc]
        if self.pixels_field in processed:
            shapes = planned_items(hf_kwargs).images
            processed[COUNTS_FIELD] = torch.tensor([shape_row(shape) for shape in shapes])
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields: Mapping[str, MultiModalFieldConfig] = super()._get_mm_fields_config(  # type: ignore[misc]
            hf_inputs, without_pruning_keys(hf_processor_mm_kwargs)
        )
        # On the CPU: the encoder uses the counts as shapes and must not wait for a device.
        counts = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return {**fields, COUNTS_FIELD: counts}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        updates: Sequence[Any] = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, without_pruning_keys(hf_processor_mm_kwargs), out_mm_kwargs
        )
        items = {m: out_mm_kwargs.get(m, ()) for m in self.info.modalities}
        return [
            replace(update, replacement=_shortened(update.replacement, items[update.modality]))
            for update in updates
            if update.modality in items
        ]


def _shortened(content: Any, items: Sequence[Any]) -> Callable[[int], PromptUpdateDetails]:
    """Replacement of a placeholder by as many visual tokens as Stage I keeps.

    Args:
        content: vLLM's replacement: tokens, or a function from an item's index to them. Text may
            stand before and after the visual tokens, which are equal, and between the frames of
            a video. Text between the tokens of a pruned image or frame is left out.
        items: Processed images or videos. Those sent as embeddings have no field with counts.
    """

    def replacement(i: int) -> PromptUpdateDetails:
        update = content(i) if callable(content) else content
        if not isinstance(update, PromptUpdateDetails):
            update = PromptUpdateDetails.from_seq(update)
        video = shape_of_item(items[i])
        if video is None:
            return update
        kept = [*(counts.stages[0] for counts, _ in video.frames), video.tail]
        num_patches = video.frame.counts.encoder  # of each frame
        is_visual = [True] * len(update.full)
        if update.is_embed is not None:
            is_visual = update.is_embed(update.full).tolist()
        num_visual = sum(is_visual)
        if num_visual != num_patches * video.num_frames + video.tail:
            raise MisprocessedImageError(
                f"it has {num_visual} visual tokens, but {num_patches} were planned for each "
                f"of {video.num_frames} frames, and {video.tail} after them"
            )
        if not any(counts.is_pruned for counts, _ in video.frames):
            return update
        # Of each frame's V tokens the first n1, because all are equal.
        before = accumulate(is_visual, initial=0)  # visual tokens before each token
        is_left = [
            number % num_patches < (kept[number // num_patches] if visual else 1)
            for visual, number in zip(is_visual, before, strict=False)
        ]
        return replace(update, full=[*compress(update.full, is_left)])

    return replacement
