"""Random Qwen3-VL checkpoints, dense and MoE, loadable by transformers and vLLM."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.qwen_checkpoint import (
    QwenVLShape,
    byte_tokenizer,
    random_weight,
    save_model,
    save_processor,
    token_ids,
)


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
    import transformers

    tokenizer = byte_tokenizer()
    decoder = shape.decoder_sizes(tokenizer) | {"head_dim": shape.head_size}
    decoder["rope_parameters"]["mrope_interleaved"] = True
    if shape.experts:
        decoder |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": shape.intermediate,
            "norm_topk_prob": True,
        }
    config_class = getattr(transformers, "Qwen3VLMoeConfig" if shape.experts else "Qwen3VLConfig")
    config = config_class(
        architectures=[shape.architecture],
        vision_config={
            **shape.vision_sizes(),
            "deepstack_visual_indexes": [*shape.deepstack],
            "num_position_embeddings": shape.learned_side**2,
        },
        text_config=decoder,
        **token_ids(tokenizer),
    )
    save_processor(
        path,
        transformers.Qwen3VLProcessor,
        transformers.Qwen3VLVideoProcessor,
        tokenizer,
        shape.patch,
        shape.pixel_limits,
    )
    model = getattr(transformers, shape.architecture)
    save_model(path, model, config, seed, dtype, _weight_as_published)


def _weight_as_published(name: str, weight: Any) -> Any:
    """A random weight as published: each expert's matrix is (inputs, outputs).

    ``random_weight`` takes an expert's whole matrix for fan-in, which this undoes.
    """
    random = random_weight(name, weight)
    if ".experts." not in name:
        return random
    return (random * weight.shape[1] ** 0.5).transpose(1, 2).contiguous()
