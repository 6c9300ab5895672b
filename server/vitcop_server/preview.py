"""The plan of an image or a video, from its size alone: no model runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from vitcop_server.usage import PrunedModel
from vitcop_vllm.pruning.amount import Amount
from vitcop_vllm.pruning.plan import VisualTokenCounts, effective_ratio
from vitcop_vllm.pruning.selectors import selector_of

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

USUAL_SIDE = 1008
"""Longest side, in pixels, of the image in a plan without a size.

The largest image of a model without a fixed input has about 16,000 tokens: unusual. 1008 is
a multiple of 14, 16 and 28, so an image of that side fits the model's grid without scaling.
"""


@dataclass(frozen=True)
class Preview:
    """The served model's plans for images and videos.

    Attributes:
        model: The served model's settings and number of layers.
        info: vLLM's processing info of the model, with our plans.
        kv_bytes: Bytes of a token's keys and values in one layer, over all devices.
    """

    model: PrunedModel
    info: Any
    kv_bytes: int

    @property
    def first_layers(self) -> tuple[int, ...]:
        """First decoder layer of each stage."""
        return (0, *self.model.settings.boundaries(self.model.num_layers))

    @property
    def saliency_source(self) -> str | None:
        """The score by which Stage I ranks visual tokens; see ``Selector.saliency_source``."""
        selector = selector_of(self.model.settings.selector)
        return selector.saliency_source(has_cls=self.info.reads_cls)

    def input_size(self) -> tuple[int, int]:
        """Width and height of the model's largest input, at most ``USUAL_SIDE`` each."""
        size = self.info.get_image_size_with_most_features()
        return min(size.width, USUAL_SIDE), min(size.height, USUAL_SIDE)

    def counts(self, width: int, height: int, amount: Amount) -> VisualTokenCounts:
        """Counts of visual tokens for an image's size in pixels, of which ``amount`` is dropped.

        Raises:
            ValueError: If the model does not accept an image of this size.
        """
        tokens = self.info.layout(width, height).num_tokens
        counts: VisualTokenCounts = self.info.counts(tokens, amount)
        return counts

    def ratio_of_image(self, image: Image, amount: Amount) -> float:
        """Pruning ratio of an image whose request asks for ``amount``."""
        layout = self.info.detailed_layout(image, *image.size)
        ratio: float = amount.ratio(layout.num_tokens, layout.dense_share)
        return ratio

    def image_fields(self, width: int, height: int, counts: VisualTokenCounts) -> dict[str, Any]:
        """Fields of an answer about one image: its crop, its grid and its counts."""
        layout = self.info.layout(width, height)
        return self._fields(width, height, layout.box, layout.grids, counts)

    def frame_fields(
        self, width: int, height: int, grids: Sequence[Any], counts: VisualTokenCounts
    ) -> dict[str, Any]:
        """:meth:`image_fields` of a video's frame, all of which the encoder sees."""
        return self._fields(width, height, (0.0, 0.0, float(width), float(height)), grids, counts)

    def _fields(
        self,
        width: int,
        height: int,
        box: tuple[float, float, float, float],
        grids: Sequence[Any],
        counts: VisualTokenCounts,
    ) -> dict[str, Any]:
        boundaries = self.model.settings.boundaries(self.model.num_layers)
        return {
            "width": width,
            "height": height,
            "box": list(box),
            "grids": [grid._asdict() for grid in grids],
            "effective_ratio": effective_ratio([counts], boundaries, self.model.num_layers),
            "encoder_tokens": counts.encoder,
            "cluster_centres": counts.centres,
            "saliency_source": self.saliency_source,
        }

    def stage_fields(self, counts: VisualTokenCounts) -> list[dict[str, Any]]:
        """Layers and tokens of each stage."""
        first = self.first_layers
        last = [*(layer - 1 for layer in first[1:]), self.model.num_layers - 1]
        return [
            {"first_layer": a, "last_layer": b, "tokens": tokens}
            for a, b, tokens in zip(first, last, counts.stages, strict=True)
        ]

    def plan_fields(self, width: int, height: int, amount: Amount) -> dict[str, Any]:
        """The answer of ``/v1/pruning/plan``.

        ``decoder_speed_up`` covers the image's tokens only, and assumes a cost proportional to
        tokens. ``kv_bytes`` covers the image's tokens, without rounding up to blocks.

        Raises:
            ValueError: If the model does not accept an image of this size.
        """
        counts = self.counts(width, height, amount)
        return {
            "pruning_ratio": amount.ratio(counts.encoder, None),
            **self.image_fields(width, height, counts),
            **self._savings(self.stage_fields(counts), counts.encoder),
        }

    def video_plan_fields(
        self, width: int, height: int, num_frames: int, amount: Amount
    ) -> dict[str, Any]:
        """The answer of ``/v1/pruning/plan`` for a video; tokens are summed over its frames.

        Args:
            width, height: Size of the frames in pixels.
            num_frames: Frames that vLLM's loader reads.
            amount: What is dropped of each frame.

        Raises:
            ValueError: If the model does not accept such a video.
        """
        layout = self.info.video_layout(num_frames, width, height, _description(num_frames), {})
        first, others = self.info.video_counts(layout, amount)
        frames = [first, *[others] * (layout.num_frames - 1)]
        boundaries = self.model.settings.boundaries(self.model.num_layers)
        encoder = sum(counts.encoder for counts in frames)
        stages = [
            {**stage, "tokens": sum(counts.stages[number] for counts in frames)}
            for number, stage in enumerate(self.stage_fields(first))
        ]
        return {
            "pruning_ratio": amount.ratio(others.encoder, None),
            **self.frame_fields(width, height, layout.grids, others),
            "frames": layout.num_frames,
            "effective_ratio": effective_ratio(frames, boundaries, self.model.num_layers),
            "encoder_tokens": encoder,
            **self._savings(stages, encoder),
        }

    def _savings(self, stages: list[dict[str, Any]], encoder: int) -> dict[str, Any]:
        """The fields of a plan that follow from the tokens of each stage."""
        slots = sum(s["tokens"] * (s["last_layer"] - s["first_layer"] + 1) for s in stages)
        unpruned = encoder * self.model.num_layers
        kv_bytes = {"unpruned": unpruned * self.kv_bytes, "pruned": slots * self.kv_bytes}
        return {
            "stages": stages,
            "decoder_speed_up": unpruned / slots,
            "kv_bytes": {**kv_bytes, "saved": kv_bytes["unpruned"] - kv_bytes["pruned"]},
        }


def _description(num_frames: int) -> dict[str, Any]:
    """What vLLM's loader says of a video of which it read all frames, two per second."""
    return {
        "fps": 2.0,
        "duration": num_frames / 2,
        "total_num_frames": num_frames,
        "frames_indices": list(range(num_frames)),
        "do_sample_frames": False,
    }


def preview_of(engine_client: Any, model: PrunedModel) -> Preview:
    """Build the preview of a running server."""
    info = engine_client.renderer.mm_processor.info
    return Preview(model, info, _kv_bytes(engine_client.vllm_config))


def _kv_bytes(vllm_config: Any) -> int:
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    heads = model_config.get_num_kv_heads(parallel) * parallel.tensor_parallel_size
    cache_dtype = vllm_config.cache_config.cache_dtype
    dtype = str(model_config.dtype) if cache_dtype == "auto" else cache_dtype
    size = _DTYPE_BYTES.get(dtype.removeprefix("torch."), 1)  # all others are FP8
    return int(2 * heads * model_config.get_head_size() * size)
