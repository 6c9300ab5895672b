"""Qwen3-VL, dense and MoE, with visual token pruning. See ``qwen_vl``.

The decoder adds features of earlier encoder blocks after its first layers: deepstack. An image's
embeddings hold them as columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl_moe import (
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from vitcop_vllm.models.packed_tower import SelectRows
from vitcop_vllm.models.pruned_model import PrunedModel
from vitcop_vllm.models.qwen_vl import (
    PrunedQwen,
    QwenProcessingInfo,
    QwenProcessor,
    attention_of_kept_rows,
)
from vitcop_vllm.pruning.grids import Grid


class PrunedQwen3ProcessingInfo(QwenProcessingInfo, Qwen3VLProcessingInfo):
    position_slack = 1

    def _samples_frames(self, processor: Any, metadata: Mapping[str, Any]) -> bool:
        return bool(metadata.get("do_sample_frames", False))

    def _num_positions(self, num_frames: int, grid: Grid, seconds: float) -> int:
        # A prompt has text before each frame, and each frame begins where its text ends.
        return num_frames * max(grid.rows, grid.columns)


class PrunedQwen3MoeProcessingInfo(PrunedQwen3ProcessingInfo, Qwen3VLMoeProcessingInfo):
    pass


class PrunedQwen3Processor(QwenProcessor, Qwen3VLMultiModalProcessor):
    pass


class Qwen3Tower(PrunedQwen):
    """The encoder of Qwen3-VL. It computes tokens in the grid's order."""

    @property
    def num_deepstack_levels(self) -> int:
        this: Any = self
        levels: int = this.deepstack_num_level
        return levels

    def run_tower(
        self,
        pixels: torch.Tensor,
        grids: Sequence[Sequence[int]],
        num_kept: int,
        select_rows: SelectRows,
    ) -> torch.Tensor:
        tower = self.visual
        last = tower.blocks[-1]
        levels = tower.deepstack_visual_indexes
        features: dict[int, torch.Tensor] = {}

        def before_norm(index: int, _: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            (features[index],) = inputs

        with attention_of_kept_rows(last.attn, select_rows) as rows, ExitStack() as undo:

            def forward(x: torch.Tensor, **metadata: Any) -> torch.Tensor:
                # As the block's own forward, which adds attention to all rows.
                attended = last.attn(last.norm1(x), **metadata)
                x = x[rows[0]] + attended
                features[len(tower.blocks) - 1] = x = x + last.mlp(last.norm2(x))
                return x

            last.forward = forward
            undo.callback(delattr, last, "forward")
            for index, block in enumerate(tower.blocks[1:]):
                if index in levels:
                    # Not a hook of the block before: vLLM's blocks call none.
                    hook = block.norm1.register_forward_pre_hook(partial(before_norm, index))
                    undo.callback(hook.remove)
            # The tower would merge the features of all rows.
            tower.deepstack_visual_indexes = []
            undo.callback(setattr, tower, "deepstack_visual_indexes", levels)
            embedded = tower(pixels, grids)
        parts = [embedded]
        for index, merger in zip(levels, tower.deepstack_merger_list, strict=True):
            output = features[index]
            parts.append(merger(output if tower.blocks[index] is last else output[rows[0]]))
        return torch.cat(parts, dim=1)


class PrunedQwen3(Qwen3Tower, PrunedModel):
    """A Qwen3-VL, dense or MoE."""

    @contextmanager
    def take_deepstack(self, num_rows: int) -> Iterator[IntermediateTensors | None]:
        # As vLLM's forward, which a staged step does not call.
        this: Any = self
        yield this._get_deepstack_input_embeds(num_rows)
        this._clear_deepstack_input_embeds(num_rows)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3Processor,
    info=PrunedQwen3ProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class PrunedQwen3ForConditionalGeneration(PrunedQwen3, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3Processor,
    info=PrunedQwen3MoeProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class PrunedQwen3MoeForConditionalGeneration(PrunedQwen3, Qwen3VLMoeForConditionalGeneration):
    """vLLM's Qwen3-VL-MoE."""
