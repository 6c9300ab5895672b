"""Qwen2.5-VL with visual token pruning. See ``qwen_vl``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.torch_utils import async_tensor_h2d

from vitcop_vllm.models.mrope import MRoPEImage, adjacent_frames
from vitcop_vllm.models.packed_tower import SelectRows
from vitcop_vllm.models.pruned_model import PrunedModel
from vitcop_vllm.models.qwen_vl import (
    PrunedQwen,
    QwenProcessingInfo,
    QwenProcessor,
    attention_of_kept_rows,
)
from vitcop_vllm.pruning.grids import Grid


class PrunedQwen25ProcessingInfo(QwenProcessingInfo, Qwen2_5_VLProcessingInfo):
    position_slack = 4  # vLLM's MRotaryEmbedding makes its table 4 times as long

    def _num_positions(self, num_frames: int, grid: Grid, seconds: float) -> int:
        of_second = seconds * self._config.vision_config.tokens_per_second
        return max(frame_times(num_frames, of_second)[-1] + 1, grid.rows, grid.columns)


def frame_times(num_frames: int, frame_positions: float) -> list[int]:
    """Position of each frame in time, relative to the first.

    Args:
        num_frames: Number of frames.
        frame_positions: Positions between frames, before rounding.
    """
    times: list[int] = (np.arange(num_frames) * frame_positions).astype(np.int64).tolist()
    return times


class PrunedQwen25Processor(QwenProcessor, Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen25Processor,
    info=PrunedQwen25ProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwen25ForConditionalGeneration(
    PrunedQwen, PrunedModel, Qwen2_5_VLForConditionalGeneration
):
    """vLLM's Qwen2.5-VL. Its tower computes tokens window by window.

    A prompt has no text between a video's frames. Their positions in time follow the clock.
    """

    def frames_in_prompt(
        self, frames: list[MRoPEImage], data: Mapping[str, Any]
    ) -> list[MRoPEImage]:
        # As vLLM's iter_mm_grid_thw.
        seconds = data.get("second_per_grid_ts")
        of_second = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        between = of_second * (1.0 if seconds is None else seconds.data.item())
        return adjacent_frames(frames, frame_times(len(frames), between))

    def token_order(self, grid: Sequence[int]) -> torch.Tensor:
        tower = self.visual
        _, _, window_index, _, _ = tower.get_rope_by_thw(*grid)
        return async_tensor_h2d(tower.invert_permutation(window_index), device=tower.device)

    def run_tower(
        self,
        pixels: torch.Tensor,
        grids: Sequence[Sequence[int]],
        num_kept: int,
        select_rows: SelectRows,
    ) -> torch.Tensor:
        tower = self.visual
        metadata = tower.prepare_encoder_metadata(grids)
        # The last block outputs only the kept rows, already in the order of the images' grids. So
        # the tower must not reorder them.
        metadata["reverse_indices"] = torch.arange(num_kept, device=pixels.device)
        block = tower.blocks[-1]
        with attention_of_kept_rows(block.attn, select_rows) as rows:

            def before_norm(_: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
                # The residual that the norm adds is attention's output: kept rows only.
                return (inputs[0][rows[0]],), named

            hook = block.norm2.register_forward_pre_hook(before_norm, with_kwargs=True)
            try:
                embedded: torch.Tensor = tower(pixels, None, encoder_metadata=metadata)
            finally:
                hook.remove()
        return embedded
