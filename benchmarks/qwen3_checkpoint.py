"""Random Qwen3-VL checkpoints, dense and MoE, loadable by transformers and vLLM."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import SMALL_SIZES, byte_tokenizer, random_weight, save_model
from benchmarks.qwen_checkpoint import SPECIALS, QwenVLShape, save_processor, token_ids


@dataclass(frozen=True, kw_only=True)
class Qwen3Shape(QwenVLShape):
    """Sizes of a Qwen3-VL model.

    Attributes:
        deepstack: Vision layers whose features the decoder adds after its first layers.
        learned_side: Learned positions along a side, interpolated to an image's patches.
        head_size: Width of a decoder head.
        experts: Experts of each decoder layer, two of which compute a token; 0 for a dense model.
    """

    patch_size: int = 16
    deepstack: tuple[int, ...]
    learned_side: int
    head_size: int
    experts: int = 0

    @property
    def mrope_section(self) -> list[int]:
        # As published: 24, 20 and 20 of 64 frequencies. Row and column take every third one.
        frequencies = self.head_size // 2
        of_row = frequencies * 20 // 64
        return [frequencies - 2 * of_row, of_row, of_row]

    def decoder_sizes(self, tokenizer: Any, vocabulary_size: int = 0) -> dict[str, Any]:
        sizes = super().decoder_sizes(tokenizer, vocabulary_size) | {"head_dim": self.head_size}
        sizes["rope_parameters"]["mrope_interleaved"] = True
        if self.experts:
            sizes |= {
                "num_experts": self.experts,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": self.intermediate,
                "norm_topk_prob": True,
            }
        return sizes


SMALL = Qwen3Shape(
    max_visual_tokens=2400,
    vision_intermediate=640,
    deepstack=(2, 4, 6),
    learned_side=48,
    layers=36,
    head_size=64,
    **SMALL_SIZES,
    boundaries=(3, 27),  # as in configs/qwen3-vl-8b.yaml
    image_size=1536,
)
"""Small enough for a CPU; the decoder's depth is the 8B model's."""


def save_random_qwen3(
    path: Path, shape: Qwen3Shape, *, seed: int = 0, dtype: str = "float32"
) -> None:
    """Write a checkpoint with seeded random weights of a torch ``dtype``."""
    import transformers

    kind = "Qwen3VLMoe" if shape.experts else "Qwen3VL"
    tokenizer = byte_tokenizer(SPECIALS)
    config = getattr(transformers, f"{kind}Config")(
        vision_config={
            **shape.vision_sizes(),
            "deepstack_visual_indexes": [*shape.deepstack],
            "num_position_embeddings": shape.learned_side**2,
        },
        text_config=shape.decoder_sizes(tokenizer),
        **token_ids(tokenizer),
    )
    processors = transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor
    save_processor(path, shape, tokenizer, *processors)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")
    save_model(path, model, config, seed, dtype, _weight_as_published)


def _weight_as_published(name: str, weight: Any) -> Any:
    """A random weight as published: each expert's matrix is (inputs, outputs).

    ``random_weight`` takes an expert's whole matrix for fan-in, which this undoes.
    """
    random = random_weight(name, weight)
    if ".experts." not in name:
        return random
    return (random * weight.shape[1] ** 0.5).transpose(1, 2).contiguous()
