"""LLaVA-1.5's prompts and pictures: laid out for what pruning leaves, and named so."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from http import HTTPStatus
from typing import Any

import torch
from transformers import BatchFeature
from vllm.exceptions import GracefulHTTPError
from vllm.inputs import MultiModalHashes, MultiModalInput
from vllm.logger import init_logger
from vllm.model_executor.models.llava import LlavaMultiModalProcessor, LlavaProcessingInfo
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import (
    ImageEmbeddingItems,
    ImageProcessorItems,
    MultiModalDataItems,
)
from vllm.multimodal.processing import PromptReplacement, PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs

from vitcop_vllm.engine.config import settings_of
from vitcop_vllm.engine.metrics import COUNTS_MISMATCHES
from vitcop_vllm.models.layout import ImageLayout
from vitcop_vllm.pruning.identity import (
    EXPLAIN_KEY,
    CountsMismatchError,
    counts_in_prompt,
    explained_identifier,
    tag_identifier,
)
from vitcop_vllm.pruning.plan import VisualTokenCounts, plan_counts
from vitcop_vllm.pruning.settings import RATIO_KEY, PruningSettings

logger = init_logger(f"vllm.{__name__}")

COUNTS_FIELD = "visual_token_counts"
"""Name under which a picture's counts reach the encoder: V, K, n1, n2, n3."""


class MisprocessedImageError(GracefulHTTPError, CountsMismatchError):
    """A fault of the processor: vLLM's server answers the request with status 503."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"the server processed an image of this request wrongly: {message}",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )


class PrunedLlavaProcessingInfo(LlavaProcessingInfo):
    """What the processor knows of the model, and of pruning."""

    @cached_property
    def settings(self) -> PruningSettings:
        return settings_of(self.get_hf_config())

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Budgets are for the largest picture a request may ask for: one not pruned."""
        return {"image": self.get_max_image_tokens()}

    def counts(
        self, num_image_tokens: int, processor_kwargs: Mapping[str, object]
    ) -> VisualTokenCounts:
        """Counts of one picture under a request's processor keywords.

        Raises:
            ValueError: If the ratio among them is not acceptable.
        """
        settings = self.settings
        ratio = settings.default_ratio
        if RATIO_KEY in processor_kwargs:
            ratio = settings.parse_ratio(processor_kwargs[RATIO_KEY])
        config: Any = self.get_hf_config()
        return plan_counts(settings, ratio, config.text_config.num_hidden_layers, num_image_tokens)

    def layout(
        self, width: int, height: int, processor_kwargs: Mapping[str, object] | None = None
    ) -> ImageLayout:
        """Grid of visual tokens and visible part of an image.

        CLIP's processor scales the shorter side to the model's input and crops the middle.
        Where an image is not cropped it is seen whole.

        Args:
            width, height: Of the image as it was sent, in pixels.
            processor_kwargs: The request's processor keywords; none changes this model's layout.
        """
        vision: Any = self.get_hf_config().vision_config
        side = vision.image_size // vision.patch_size
        return ImageLayout(side, side, self._visible_box(width, height))

    def _visible_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        processor: Any = self.get_hf_processor().image_processor
        size, crop = dict(processor.size), dict(processor.crop_size or {})
        if not (processor.do_resize and processor.do_center_crop and size.get("shortest_edge")):
            return 0.0, 0.0, float(width), float(height)
        shorter = min(width, height)
        edges = []
        for side, cropped in ((width, crop["width"]), (height, crop["height"])):
            resized = _resized_side(size["shortest_edge"], side, shorter)
            first = (resized - cropped) // 2
            edges.append((first * side / resized, (first + cropped) * side / resized))
        (left, right), (top, bottom) = edges
        return left, top, right, bottom


def _resized_side(shortest_edge: int, side: int, shorter: int) -> int:
    # As the processor of Hugging Face rounds.
    return shortest_edge if side == shorter else int(shortest_edge * side / shorter)


def _theirs(processor_kwargs: Mapping[str, object]) -> dict[str, object]:
    """What is meant for the processor of Hugging Face."""
    return {k: v for k, v in processor_kwargs.items() if k not in (RATIO_KEY, EXPLAIN_KEY)}


class PrunedLlavaMultiModalProcessor(LlavaMultiModalProcessor):
    """Lays out a prompt for the tokens a picture keeps, and names the picture so."""

    info: PrunedLlavaProcessingInfo

    def _image_counts(
        self, mm_items: MultiModalDataItems, processor_kwargs: Mapping[str, object]
    ) -> list[VisualTokenCounts]:
        images = mm_items.get("image")
        if images is None:
            return []
        if isinstance(images, ImageEmbeddingItems):
            if processor_kwargs.get(RATIO_KEY):
                raise ValueError(
                    f"{RATIO_KEY} needs pictures: image embeddings have no [CLS] attention "
                    "to prune by"
                )
            sizes = [images.get_feature_size(i) for i in range(images.get_count())]
            return [VisualTokenCounts.unpruned(size) for size in sizes]
        counts = []
        for i in range(images.get_count()):
            if images.get(i) is None:
                # Sent by its uuid alone: vLLM has it cached. All pictures are scaled alike.
                tokens = self.info.get_max_image_tokens()
            else:
                size = images.get_image_size(i)
                tokens = self.info.get_num_image_tokens(
                    image_width=size.width, image_height=size.height
                )
            counts.append(self.info.counts(tokens, processor_kwargs))
        return counts

    def apply(self, *args: Any, **kwargs: Any) -> MultiModalInput:
        """vLLM's processed prompt.

        Raises:
            MisprocessedImageError: If an image's identifier contradicts its placeholders.
                Here the error costs one request; in the engine it would cost all.
        """
        processed = super().apply(*args, **kwargs)
        names = processed["mm_hashes"].get("image", ())
        places = processed["mm_placeholders"].get("image", ())
        try:
            for name, place in zip(names, places, strict=True):
                counts_in_prompt(name, place.length)
        except CountsMismatchError as error:
            COUNTS_MISMATCHES.labels("processor").inc()
            logger.error("Request refused: %s", error)
            raise MisprocessedImageError(str(error)) from None
        return processed

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """Inputs for memory profiling: pictures that are not pruned."""
        return replace(
            super().get_dummy_inputs(*args, **kwargs), hf_processor_mm_kwargs={RATIO_KEY: 0}
        )

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> MultiModalHashes:
        # The counts tell pictures apart; the ratio itself would split equal counts.
        plain = _theirs(inputs.hf_processor_mm_kwargs)
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=plain))
        counts = self._image_counts(inputs.mm_data_items, inputs.hf_processor_mm_kwargs)
        if "image" in hashes:
            hashes["image"] = [
                tag_identifier(mm_hash, one)
                for mm_hash, one in zip(hashes["image"], counts, strict=True)
            ]
        request = inputs.hf_processor_mm_kwargs.get(EXPLAIN_KEY)
        images = inputs.mm_data_items.get("image")
        if request is not None and isinstance(images, ImageProcessorItems):
            hashes["image"] = [
                explained_identifier(str(request), i, images.get_image_size(i), name)
                for i, name in enumerate(hashes["image"])
            ]
        return hashes

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        processed = super()._apply_hf_processor_main(mm_items, _theirs(hf_kwargs))
        if "pixel_values" in processed:
            counts = self._image_counts(mm_items, hf_kwargs)
            processed[COUNTS_FIELD] = torch.tensor(
                [[one.encoder, one.centres, *one.stages] for one in counts]
            )
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            **super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs),
            # On the CPU: the encoder needs them as shapes, without waiting for a device.
            COUNTS_FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token = self.info.get_hf_config().image_token_index
        counts = self._image_counts(mm_items, hf_processor_mm_kwargs)
        return [
            PromptReplacement(
                modality="image",
                target=[token],
                replacement=lambda i: [token] * counts[i].stages[0],
            )
        ]
