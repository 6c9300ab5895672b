"""The model families that are pruned: which class serves each, and what it needs at start-up.

To add a family: its file in ``models``, and a row here. docs/adding-a-model.md tells how.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Checks = Mapping[str, bool]
"""Sentence that says what cannot work and what to change -> whether that is so."""


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        model: ``module:Class`` that serves the architecture.
        decoders: ``model_type`` of the text configurations whose layers can be staged.
        has_cls: Whether the encoder has [CLS], whose attention Stage I then reads.
        checks: What else must hold of vLLM's configuration.
    """

    model: str
    decoders: tuple[str, ...]
    has_cls: bool
    checks: Callable[[Any], Checks]


def _llava_checks(vllm_config: Any) -> Checks:
    from transformers import CLIPVisionConfig

    config = vllm_config.model_config.hf_config
    tower = config.vision_config
    return {
        "Stage I reads the [CLS] attention of a CLIP tower and this model's is "
        f"{type(tower).__name__}; serve it with stock vLLM (VLLM_PLUGINS='')": (
            not isinstance(tower, CLIPVisionConfig)
        ),
        "Stage I needs one vision_feature_layer": not isinstance(
            getattr(config, "vision_feature_layer", None), int
        ),
        "Stage I needs vision_feature_select_strategy 'default', which leaves [CLS] out": (
            getattr(config, "vision_feature_select_strategy", None) != "default"
        ),
    }


def _qwen2_5_vl_checks(vllm_config: Any) -> Checks:
    tower = vllm_config.model_config.hf_config.vision_config
    mm_config = vllm_config.model_config.get_multimodal_config()
    compilation = vllm_config.compilation_config
    return {
        "Stage I reads the attention of the encoder's last block, and this model's last block "
        "attends within windows; serve it with stock vLLM (VLLM_PLUGINS='')": (
            tower.depth - 1 not in tower.fullatt_block_indexes
        ),
        "a data-parallel encoder computes an image on one rank, and Stage I is computed by all; "
        "remove --mm-encoder-tp-mode data": mm_config.mm_encoder_tp_mode == "data",
        "a compiled encoder always computes all rows of its last block; unset the compilation "
        "config's compile_mm_encoder": bool(compilation.compile_mm_encoder),
        "CUDA graphs of the encoder hold no Stage I; unset the compilation config's "
        "cudagraph_mm_encoder": bool(getattr(compilation, "cudagraph_mm_encoder", False)),
        "vLLM's pruning of videos moves positions that pruning of images needs; remove "
        "--video-pruning-rate": bool(mm_config.is_multimodal_pruning_enabled()),
    }


FAMILIES: dict[str, Family] = {
    "LlavaForConditionalGeneration": Family(
        "vitcop_vllm.models.llava:PrunedLlavaForConditionalGeneration",
        decoders=("llama",),
        has_cls=True,
        checks=_llava_checks,
    ),
    "Qwen2_5_VLForConditionalGeneration": Family(
        "vitcop_vllm.models.qwen2_5_vl:PrunedQwenForConditionalGeneration",
        decoders=("qwen2", "qwen2_5_vl_text", "qwen2_5_vl"),
        has_cls=False,
        checks=_qwen2_5_vl_checks,
    ),
}
"""Architecture in a checkpoint's config.json -> its family."""
