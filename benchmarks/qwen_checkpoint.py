"""Random Qwen2.5-VL checkpoints, loadable by transformers and vLLM.

Random weights give nonsense answers, but are enough for tests and speed. The architecture is the
real one: a vision tower with windowed and full attention, a 2x2 merger, a decoder with M-RoPE and
grouped-query heads, a chat template, and a processor for images and videos.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vitcop_vllm.demo.checkpoint import save_weights

IMAGE_MARKER = "<|vision_start|><|image_pad|><|vision_end|>"
"""Marks an image in a prompt's text."""

VIDEO_MARKER = IMAGE_MARKER.replace("image", "video")

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{IMAGE_MARKER}"
    f"{{% elif part['type'] == 'video' %}}{VIDEO_MARKER}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MERGE = 2
"""Patches along a side of a visual token."""


@dataclass(frozen=True, kw_only=True)
class QwenVLShape:
    """Sizes of a Qwen-VL model.

    Attributes:
        patch: Pixels along a side of a patch.
        min_visual_tokens, max_visual_tokens: Limits that images are scaled to.
        vision_hidden, vision_layers, vision_heads, vision_intermediate: The vision tower.
        hidden, layers, heads, kv_heads, intermediate: The decoder.
        max_positions: Longest sequence in tokens.
        rope_theta: Base of the rotary embedding's wavelengths.
        boundaries: ``shallow_boundary`` and ``deep_boundary`` of pruning, if not the default.
        image_size: Height and width of a bench's images, in pixels.
    """

    patch: ClassVar[int]

    min_visual_tokens: int = 4
    max_visual_tokens: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_intermediate: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    max_positions: int = 4096
    rope_theta: float = 1_000_000.0
    boundaries: tuple[int, int] | None = None
    image_size: int = 448

    @property
    def token_side(self) -> int:
        """Pixels along a side of a visual token."""
        return self.patch * MERGE

    @property
    def rotary_width(self) -> int:
        """Width of a decoder head."""
        return self.hidden // self.heads

    @property
    def mrope_section(self) -> list[int]:
        """Rotary frequencies of time, row and column."""
        # As in Qwen: a quarter of the frequencies for time, the rest for row and column.
        frequencies = self.rotary_width // 2
        of_time = frequencies // 4
        of_row = (frequencies - of_time) // 2
        return [of_time, of_row, frequencies - of_time - of_row]

    def vision_sizes(self) -> dict[str, Any]:
        """Arguments of the vision tower's configuration that all families have."""
        return {
            "depth": self.vision_layers,
            "hidden_size": self.vision_hidden,
            "intermediate_size": self.vision_intermediate,
            "num_heads": self.vision_heads,
            "patch_size": self.patch,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": self.hidden,
        }

    def decoder_sizes(self, tokenizer: Any) -> dict[str, Any]:
        """Arguments of the decoder's configuration that all families have."""
        token = tokenizer.convert_tokens_to_ids
        return {
            "vocab_size": len(tokenizer),
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "mrope_section": self.mrope_section,
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
        }

    @property
    def pixel_limits(self) -> dict[str, int]:
        """Limits on the pixels of a scaled image, with the processor's names."""
        pixels = self.token_side**2
        least, most = self.min_visual_tokens * pixels, self.max_visual_tokens * pixels
        return {"shortest_edge": least, "longest_edge": most}

    @property
    def visual_tokens(self) -> int:
        """V, the visual tokens of an image of ``image_size``."""
        return self.tokens_of(self.image_size, self.image_size)

    def tokens_of(self, width: int, height: int) -> int:
        """V, the visual tokens of an image of that size."""
        rows, columns = self.grid(width, height)
        return rows * columns

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of visual tokens for an image size."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        side = self.token_side
        height, width = smart_resize(height, width, side, *self.pixel_limits.values())
        return height // side, width // side


@dataclass(frozen=True, kw_only=True)
class QwenShape(QwenVLShape):
    """Sizes of a Qwen2.5-VL model.

    Attributes:
        window: Visual tokens along a side of an attention window.
        full_attention: Vision layers that attend over the whole image, the last layer among them.
    """

    patch = 14

    window: int = 4
    full_attention: tuple[int, ...]


TINY = QwenShape(
    max_visual_tokens=320,
    vision_hidden=64,
    vision_layers=4,
    vision_heads=2,
    vision_intermediate=128,
    window=3,  # most grids end in partial windows
    full_attention=(1, 3),
    hidden=128,
    layers=8,
    heads=4,
    kv_heads=2,
    intermediate=256,
    # A low base: every frequency then notices a wrong row or column.
    rope_theta=100.0,
)
"""For tests."""

SMALL = QwenShape(
    max_visual_tokens=2400,
    vision_hidden=256,
    vision_layers=8,
    vision_heads=4,
    vision_intermediate=640,
    full_attention=(7,),
    hidden=512,
    layers=28,
    heads=8,
    kv_heads=2,
    intermediate=1536,
    boundaries=(2, 20),  # as in configs/qwen2.5-vl-7b.yaml
    image_size=1344,
)
"""Small enough for a CPU. The decoder's depth and the encoder's share of a prefill are about those
of the 7B model: an eighth of the vision layers attend over the whole image."""


def save_random_qwen(
    path: Path, shape: QwenShape, *, seed: int = 0, dtype: str = "float32"
) -> None:
    """Write a checkpoint with seeded random weights of a torch ``dtype``."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = byte_tokenizer()
    config = Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        vision_config={
            **shape.vision_sizes(),
            "window_size": shape.window * shape.token_side,
            "fullatt_block_indexes": [*shape.full_attention],
        },
        text_config=shape.decoder_sizes(tokenizer),
        **token_ids(tokenizer),
    )
    save_processor(
        path, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, tokenizer, shape.patch, shape.pixel_limits
    )
    save_model(path, Qwen2_5_VLForConditionalGeneration, config, seed, dtype)


def token_ids(tokenizer: Any) -> dict[str, Any]:
    """Arguments of a Qwen-VL's configuration: its named tokens, and that none are tied."""
    token = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "tie_word_embeddings": False,
    }


def save_processor(
    path: Path,
    processor: Any,
    video_processor: Any,
    tokenizer: Any,
    patch: int,
    pixel_limits: dict[str, int],
    chat_template: str = CHAT_TEMPLATE,
) -> None:
    """Write the files of a Qwen-VL's ``processor``, a class of transformers.

    Args:
        path: Folder of the checkpoint.
        processor, video_processor: Classes of transformers.
        tokenizer: The model's tokenizer.
        patch: Pixels along a side of a patch.
        pixel_limits: As ``QwenVLShape.pixel_limits``.
        chat_template: The model's prompts.
    """
    from transformers import Qwen2VLImageProcessor

    sizes = {"patch_size": patch, "size": pixel_limits}
    processor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=video_processor(**sizes),
        chat_template=chat_template,
    ).save_pretrained(path)


def save_model(
    path: Path,
    model: Callable[[Any], Any],
    config: Any,
    seed: int,
    dtype: str,
    weight_of: Callable[[str, Any], Any] | None = None,
) -> None:
    """Write a configuration, and seeded random weights of a torch ``dtype``.

    Args:
        path: Folder of the checkpoint.
        model: Makes transformers' model of ``config``.
        config: The model's configuration.
        seed: Seed of the weights.
        dtype: Name of the dtype of the weights, which are drawn in float32.
        weight_of: Makes a random weight of a name and a weight of its shape; default:
            :func:`random_weight`.
    """
    import torch

    config.dtype = dtype
    config.save_pretrained(path)
    draw = weight_of or random_weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config.dtype = "float32"
        weights = {
            name: draw(name, weight).to(getattr(torch, dtype))
            for name, weight in model(config).state_dict().items()
        }
    save_weights(path, weights)


def byte_tokenizer(specials: tuple[str, ...] = SPECIALS) -> Any:
    """A tokenizer whose tokens are the special tokens and the bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    model = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(word, special=True) for word in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def random_weight(name: str, weight: Any) -> Any:
    """A weight scaled by fan-in; a bias or norm large enough to change answers if forgotten.

    With transformers' scale of 0.02, every prompt gets the same answer.
    """
    import torch

    noise = torch.randn_like(weight)
    if name.endswith(".bias"):
        return 0.3 * noise
    if weight.dim() == 1:
        return 1 + 0.2 * noise
    if "embed_tokens" in name:
        return noise
    # Sharp attention: answers depend on single tokens.
    scale = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
    return noise * scale * weight[0].numel() ** -0.5
