"""The model families that are pruned: which class serves each, and what it needs at start-up.

To add a family: its file in ``models``, and a row here. docs/adding-a-model.md tells how.
"""

from dataclasses import dataclass

from vitcop_vllm.engine.checks import Check, StartUp


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        name: The family's name in the documentation.
        model: ``module:Class`` that serves the architecture.
        decoders: ``model_type`` of the decoders that Stages II and III can prune. Empty: Stage I
            alone prunes the model, and its decoder runs as in vLLM.
        has_cls: Whether the encoder has [CLS], whose attention Stage I then reads.
        checks: What start-up refuses for this family.
        compares_frames: Whether Stage I can compare the frames of a video: the model has
            ``token_pixels``.
    """

    name: str
    model: str
    decoders: tuple[str, ...]
    has_cls: bool
    checks: tuple[Check, ...]
    compares_frames: bool = False


def _needs_tower(config_class: str, attention: str) -> Check:
    """Refuses an encoder whose configuration is not of this class of transformers."""

    def has_other_tower(start: StartUp) -> bool:
        import transformers

        return not isinstance(start.vision, getattr(transformers, config_class))

    return Check(
        f"Stage I reads {attention} tower and this model's is {{start.vision.__class__.__name__}}",
        "serve it with stock vLLM (VLLM_PLUGINS='')",
        has_other_tower,
    )


def _needs_strategy(strategy: str, reason: str) -> Check:
    """Refuses another ``vision_feature_select_strategy``."""
    return Check(
        reason,
        "serve this model with stock vLLM (VLLM_PLUGINS='')",
        lambda start: (
            getattr(start.vllm.model_config.hf_config, "vision_feature_select_strategy", None)
            != strategy
        ),
    )


_LLAVA_CHECKS = (
    _needs_tower("CLIPVisionConfig", "the [CLS] attention of a CLIP"),
    Check(
        "Stage I reads the attention of one layer, and this model's vision_feature_layer names "
        "several",
        "serve it with stock vLLM (VLLM_PLUGINS='')",
        lambda start: (
            not isinstance(
                getattr(start.vllm.model_config.hf_config, "vision_feature_layer", None), int
            )
        ),
    ),
    _needs_strategy(
        "default",
        "Stage I needs vision_feature_select_strategy 'default', which leaves [CLS] out",
    ),
)

_LLAVA_ONEVISION_CHECKS = (
    _needs_tower("SiglipVisionConfig", "the attention of a SigLIP"),
    _needs_strategy(
        "full",
        "Stage I reads the attention of all patches, and this model's "
        "vision_feature_select_strategy drops the first",
    ),
)

_ENCODER_CHECKS = (
    Check(
        "a data-parallel encoder computes an image on one rank, and all ranks compute Stage I",
        "remove --mm-encoder-tp-mode data",
        lambda start: start.multimodal.mm_encoder_tp_mode == "data",
    ),
    Check(
        "a compiled encoder always computes all rows of its last block",
        "unset the compilation config's compile_mm_encoder",
        lambda start: start.vllm.compilation_config.compile_mm_encoder,
    ),
    Check(
        "CUDA graphs of the encoder hold no Stage I",
        "unset the compilation config's cudagraph_mm_encoder",
        lambda start: getattr(start.vllm.compilation_config, "cudagraph_mm_encoder", False),
    ),
)

_QWEN_CHECKS = (
    *_ENCODER_CHECKS,
    Check(
        "vLLM's pruning of videos moves positions that pruning of images needs",
        "remove --video-pruning-rate",
        lambda start: start.multimodal.is_multimodal_pruning_enabled(),
    ),
)

_QWEN2_5_VL_CHECKS = (
    *_QWEN_CHECKS,
    Check(
        "Stage I reads the attention of the encoder's last block, and this model's last block "
        "attends within windows",
        "serve it with stock vLLM (VLLM_PLUGINS='')",
        lambda start: start.vision.depth - 1 not in start.vision.fullatt_block_indexes,
    ),
)

_QWEN3_VL_CHECKS = (
    *_QWEN_CHECKS,
    Check(
        "the decoder adds features of the encoder to all tokens after its first "
        "{start.deepstack_levels} layers, and Stage II would drop tokens before",
        "set shallow_boundary to {start.deepstack_levels} or more",
        lambda start: start.boundaries[0] < start.deepstack_levels,
    ),
)

_GEMMA3_CHECKS = (
    *_ENCODER_CHECKS,
    Check(
        "an image in crops has text between its visual tokens, and pruning needs them in one run",
        "remove do_pan_and_scan from --mm-processor-kwargs",
        lambda start: (start.multimodal.mm_processor_kwargs or {}).get("do_pan_and_scan"),
    ),
)

_INTERNVL_DECODERS = ("qwen2", "qwen3", "llama")

FAMILIES: dict[str, Family] = {
    "LlavaForConditionalGeneration": Family(
        "LLaVA-1.5",
        "vitcop_vllm.models.llava:PrunedLlavaForConditionalGeneration",
        decoders=("llama",),
        has_cls=True,
        checks=_LLAVA_CHECKS,
    ),
    "LlavaNextForConditionalGeneration": Family(
        "LLaVA-NeXT",
        "vitcop_vllm.models.llava_next:PrunedLlavaNextForConditionalGeneration",
        decoders=("llama", "mistral"),
        has_cls=True,
        checks=_LLAVA_CHECKS,
    ),
    "LlavaOnevisionForConditionalGeneration": Family(
        "LLaVA-OneVision",
        "vitcop_vllm.models.llava_onevision:PrunedLlavaOnevisionForConditionalGeneration",
        decoders=("qwen2",),
        has_cls=False,
        checks=_LLAVA_ONEVISION_CHECKS,
        compares_frames=True,
    ),
    "Qwen2_5_VLForConditionalGeneration": Family(
        "Qwen2.5-VL",
        "vitcop_vllm.models.qwen2_5_vl:PrunedQwen25ForConditionalGeneration",
        decoders=("qwen2", "qwen2_5_vl_text", "qwen2_5_vl"),
        has_cls=False,
        checks=_QWEN2_5_VL_CHECKS,
        compares_frames=True,
    ),
    "Qwen3VLForConditionalGeneration": Family(
        "Qwen3-VL",
        "vitcop_vllm.models.qwen3_vl:PrunedQwen3ForConditionalGeneration",
        decoders=("qwen3_vl_text",),
        has_cls=False,
        checks=_QWEN3_VL_CHECKS,
        compares_frames=True,
    ),
    "Qwen3VLMoeForConditionalGeneration": Family(
        "Qwen3-VL-MoE",
        "vitcop_vllm.models.qwen3_vl:PrunedQwen3MoeForConditionalGeneration",
        decoders=("qwen3_vl_moe_text",),
        has_cls=False,
        checks=_QWEN3_VL_CHECKS,
        compares_frames=True,
    ),
    "InternVLChatModel": Family(
        "InternVL",
        "vitcop_vllm.models.internvl:PrunedInternVLChatModel",
        decoders=_INTERNVL_DECODERS,
        has_cls=True,
        checks=_ENCODER_CHECKS,
    ),
    "InternVLForConditionalGeneration": Family(
        "InternVL",
        "vitcop_vllm.models.internvl:PrunedInternVLForConditionalGeneration",
        decoders=_INTERNVL_DECODERS,
        has_cls=True,
        checks=_ENCODER_CHECKS,
    ),
    "Gemma3ForConditionalGeneration": Family(
        "Gemma 3",
        "vitcop_vllm.models.gemma3:PrunedGemma3ForConditionalGeneration",
        decoders=(),
        has_cls=False,
        checks=_GEMMA3_CHECKS,
    ),
    "Qwen3_5ForConditionalGeneration": Family(
        "Qwen3.5",
        "vitcop_vllm.models.qwen3_5:PrunedQwen35ForConditionalGeneration",
        decoders=(),
        has_cls=False,
        checks=_QWEN_CHECKS,
    ),
    "Qwen3_5MoeForConditionalGeneration": Family(
        "Qwen3.5-MoE",
        "vitcop_vllm.models.qwen3_5:PrunedQwen35MoeForConditionalGeneration",
        decoders=(),
        has_cls=False,
        checks=_QWEN_CHECKS,
    ),
    "Mistral3ForConditionalGeneration": Family(
        "Mistral3",
        "vitcop_vllm.models.mistral3:PrunedMistral3ForConditionalGeneration",
        decoders=(),
        has_cls=False,
        checks=_ENCODER_CHECKS,
    ),
}
"""Architecture in a checkpoint's config.json -> its family."""
