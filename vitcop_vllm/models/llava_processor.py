"""Processing of LLaVA-1.5's prompts and images."""

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.llava import LlavaMultiModalProcessor, LlavaProcessingInfo

from vitcop_vllm.models.layout import ImageLayout
from vitcop_vllm.models.processing import PrunedProcessingInfo, PrunedProcessor
from vitcop_vllm.pruning.grids import Grid


class PrunedLlavaProcessingInfo(PrunedProcessingInfo, LlavaProcessingInfo):
    """All images are scaled to the same square and have equally many visual tokens."""

    def layout(
        self, width: int, height: int, processor_kwargs: Mapping[str, object] | None = None
    ) -> ImageLayout:
        """See :meth:`PrunedProcessingInfo.layout`. Processor keywords do not change the layout.

        CLIP's processor scales the shorter side to the model's input and crops the middle. If it
        is configured not to crop, the encoder sees the whole image.
        """
        vision: Any = self.get_hf_config().vision_config
        side = vision.image_size // vision.patch_size
        return ImageLayout((Grid(side, side),), self._visible_box(width, height))

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
    # Hugging Face's processor rounds like this.
    return shortest_edge if side == shorter else int(shortest_edge * side / shorter)


class PrunedLlavaMultiModalProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    """vLLM's processor, with as many placeholders per image as Stage I keeps."""
