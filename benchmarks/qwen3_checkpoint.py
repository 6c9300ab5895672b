"""Random Qwen3-VL checkpoints, dense and MoE, loadable by transformers and vLLM."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.qwen_checkpoint import (
    CHAT_TEMPLATE,
    MERGE,
    QwenVLShape,
    byte_tokenizer,
    random_weight,
)
from vitcop_vllm.demo.checkpoint import save_weights


@dataclass(frozen=True, kw_only=True)
class Qwen3Shape(QwenVLShape):
    """Sizes of a Qwen3-VL model.

    Attributes:
        deepstack: Vision layers whose features the decoder adds after its first layers.
        learned_side: Learned positions along a side, interpolated to an image's patches.
        head_size: Width of a decoder head.
        experts: Experts of each decoder layer, two of which compute a token; 0 for a dense model.
    """

    patch = 16

    deepstack: tuple[int, ...]
    learned_side: int
    head_size: int
    experts: int = 0

    @property
    def rotary_width(self) -> int:
        return self.head_size

    @property
    def mrope_section(self) -> list[int]:
        # As published: 24, 20 and 20 of 64 frequencies. Row and column take every third one.
        frequencies = self.rotary_width // 2
        of_row = frequencies * 20 // 64
        return [frequencies - 2 * of_row, of_row, of_row]

    @property
    def architecture(self) -> str:
        kind = "Moe" if self.experts else ""
        return f"Qwen3VL{kind}ForConditionalGeneration"


TINY = Qwen3Shape(
    max_visual_tokens=320,
    vision_hidden=64,
    vision_layers=4,
    vision_heads=2,
    vision_intermediate=128,
    deepstack=(0, 2),
    learned_side=7,  # images have other sides, so all positions are interpolated
    hidden=128,
    layers=8,
    heads=6,  # heads * head_size differs from hidden
    kv_heads=2,
    head_size=32,
    intermediate=256,
    rope_theta=100.0,
    boundaries=(2, 6),
)
"""For tests."""

TINY_MOE = Qwen3Shape(
    max_visual_tokens=320,
    vision_hidden=64,
    vision_layers=3,
    vision_heads=2,
    vision_intermediate=128,
    deepstack=(1, 2),  # the last layer among them
    learned_side=7,
    hidden=128,
    layers=8,
    heads=4,
    kv_heads=2,
    head_size=32,
    intermediate=64,
    experts=4,
    rope_theta=100.0,
    boundaries=(2, 6),
)
"""For tests."""

SMALL = Qwen3Shape(
    max_visual_tokens=2400,
    vision_hidden=256,
    vision_layers=8,
    vision_heads=4,
    vision_intermediate=640,
    deepstack=(2, 4, 6),
    learned_side=48,
    hidden=512,
    layers=36,
    heads=8,
    kv_heads=2,
    head_size=64,
    intermediate=1536,
    boundaries=(3, 27),  # as in configs/qwen3-vl-8b.yaml
    image_size=1536,
)
"""Small enough for a CPU; the decoder's depth is the 8B model's."""


def save_random_qwen3(
    path: Path, shape: Qwen3Shape, *, seed: int = 0, dtype: str = "float32"
) -> None:
    """Write a checkpoint with seeded random weights of a torch ``dtype``."""
    import torch
    import transformers

    tokenizer = byte_tokenizer()
    config = _config(shape, tokenizer, dtype)
    config.save_pretrained(path)
    _save_processor(path, shape, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config.dtype = "float32"  # of the random numbers
        model = getattr(transformers, shape.architecture)(config)
        weights = {
            name: _as_published(name, random_weight(name, weight)).to(getattr(torch, dtype))
            for name, weight in model.state_dict().items()
        }
    save_weights(path, weights)


def _as_published(name: str, weight: Any) -> Any:
    """A weight as published: each expert's matrix is (inputs, outputs).

    ``random_weight`` takes an expert's whole matrix for fan-in, which this undoes.
    """
    if ".experts." not in name:
        return weight
    return (weight * weight.shape[1] ** 0.5).transpose(1, 2).contiguous()


def _config(shape: Qwen3Shape, tokenizer: Any, dtype: str) -> Any:
    import transformers

    token = tokenizer.convert_tokens_to_ids
    experts = {
        "num_experts": shape.experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": shape.intermediate,
        "norm_topk_prob": True,
    }
    config_class = getattr(transformers, "Qwen3VLMoeConfig" if shape.experts else "Qwen3VLConfig")
    config = config_class(
        architectures=[shape.architecture],
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "patch_size": shape.patch,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "deepstack_visual_indexes": [*shape.deepstack],
            "num_position_embeddings": shape.learned_side**2,
            "out_hidden_size": shape.hidden,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_size,
            "max_position_embeddings": shape.max_positions,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shape.rope_theta,
                "mrope_section": shape.mrope_section,
                "mrope_interleaved": True,
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            **(experts if shape.experts else {}),
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    config.dtype = dtype
    return config


def _save_processor(path: Path, shape: Qwen3Shape, tokenizer: Any) -> None:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    sizes = {"patch_size": shape.patch, "size": shape.pixel_limits}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)
