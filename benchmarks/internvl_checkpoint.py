"""Writes InternVL checkpoints with random weights, for tests and for measurements of speed.

InternVL comes in two forms. ``chat`` is the published form, ``InternVLChatModel``, whose
configuration is Python code in the checkpoint. The other is that of transformers,
``InternVLForConditionalGeneration``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_MARKERS = {"chat": "<image>\n", "transformers": "<IMG_CONTEXT>\n"}
"""Marks an image in a prompt's text, in each form."""

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<|video_pad|>", "<video>"),
)

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARKER"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CONFIGURATION = '''"""Configuration of a random InternVL, with the names of the published code."""

from transformers import PretrainedConfig, Qwen2Config


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"

    def __init__(self, **values):
        super().__init__(**values)
        for name, value in values.items():
            setattr(self, name, value)


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    is_composition = True

    def __init__(self, vision_config=None, llm_config=None, **values):
        super().__init__(**values)
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
'''

_PUBLISHED_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.layer_norm.": "mlp1.0.",
    "model.multi_modal_projector.linear_1.": "mlp1.1.",
    "model.multi_modal_projector.linear_2.": "mlp1.3.",
    "model.vision_tower.": "vision_model.",
    "cls_token": "class_embedding",
    "patch_embeddings.projection": "patch_embedding",
    "position_embeddings": "position_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "attention.": "attn.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "ls",
}
"""Parts of the weights' names in transformers -> in the published form."""


@dataclass(frozen=True, kw_only=True)
class InternVLShape:
    """Sizes of an InternVL model.

    Attributes:
        chat: Whether the checkpoint has the published form.
        tile_size: Height and width of a tile in pixels.
        patch_size: Height and width of a patch in pixels; 2x2 patches are a visual token.
        max_tiles: Most tiles of an image, without its thumbnail.
        vision_hidden, vision_layers, vision_heads, vision_intermediate: The encoder.
        large_encoder: Whether the encoder is like InternViT-6B, with RMS norms also of queries and
            keys, and without biases of the attention; otherwise it is like InternViT-300M.
        qwen3: Whether the decoder is Qwen3, which normalises keys, as in InternVL3.5; otherwise it
            is Qwen2.
        hidden, layers, heads, kv_heads, intermediate: The decoder.
        max_positions: Longest sequence in tokens.
        rope_theta: Base of the rotary embedding's wavelengths.
        boundaries: ``shallow_boundary`` and ``deep_boundary`` of pruning, if not the default.
        image_size: Height and width of a bench's images, in pixels.
    """

    chat: bool
    tile_size: int = 448
    patch_size: int = 14
    max_tiles: int = 12
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_intermediate: int
    large_encoder: bool
    qwen3: bool
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
    def visual_tokens(self) -> int:
        """V, the visual tokens of an image of ``image_size``."""
        return self.tokens_of(self.image_size, self.image_size)

    @property
    def tokens_per_tile(self) -> int:
        return (self.tile_size // self.patch_size // 2) ** 2

    def tiles(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles for an image size: the closest aspect ratio.

        Of equal ratios, the largest whose tiles have less than twice the image's pixels.
        """
        sizes = sorted(
            (
                (rows, columns)
                for columns in range(1, self.max_tiles + 1)
                for rows in range(1, self.max_tiles // columns + 1)
            ),
            key=lambda size: size[0] * size[1],
        )
        error = {size: abs(width / height - size[1] / size[0]) for size in sizes}
        closest = [size for size in sizes if error[size] == min(error.values())]
        chosen = closest[0]
        for rows, columns in closest[1:]:
            if 2 * width * height > self.tile_size**2 * rows * columns:
                chosen = rows, columns
        return chosen

    def grids(self, width: int, height: int) -> list[tuple[int, int]]:
        """Rows and columns of the tiles' visual tokens and, behind several, the thumbnail's."""
        side = self.tile_size // self.patch_size // 2
        rows, columns = self.tiles(width, height)
        tiles = [(rows * side, columns * side)]
        return tiles if rows * columns == 1 else [*tiles, (side, side)]

    def tokens_of(self, width: int, height: int) -> int:
        """V, number of visual tokens of an image of that size."""
        return sum(rows * columns for rows, columns in self.grids(width, height))


_TINY = {
    "tile_size": 140,  # an odd number of visual tokens per side
    "max_tiles": 9,
    "vision_hidden": 64,
    "vision_layers": 3,
    "vision_heads": 2,
    "vision_intermediate": 128,
    "hidden": 128,
    "layers": 8,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 256,
    # A low base: every frequency then notices a wrong position.
    "rope_theta": 100.0,
}

TINY_CHAT = InternVLShape(
    chat=True,
    large_encoder=False,
    qwen3=False,
    **_TINY,  # type: ignore[arg-type]
)
"""25 visual tokens of a tile, at most 250 of an image."""

TINY_TRANSFORMERS = InternVLShape(
    chat=False,
    large_encoder=True,
    qwen3=True,
    **_TINY,  # type: ignore[arg-type]
)


SMALL = InternVLShape(
    chat=False,
    vision_hidden=256,
    vision_layers=8,
    vision_heads=4,
    vision_intermediate=1024,
    large_encoder=False,
    qwen3=False,
    hidden=512,
    layers=28,
    heads=8,
    kv_heads=2,
    intermediate=1536,
    boundaries=(2, 20),  # as in configs/internvl3-8b.yaml
    image_size=1344,
)
"""Small enough for a CPU; tiles and the decoder's depth are those of InternVL3-8B."""


def save_random_internvl(
    path: Path, shape: InternVLShape, *, seed: int = 0, dtype: str = "float32"
) -> None:
    """Write a whole checkpoint with seeded random weights of a torch ``dtype``."""
    import torch
    from safetensors.torch import save_file
    from transformers import InternVLForConditionalGeneration

    tokenizer = byte_tokenizer(shape)
    config = _config(shape, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = {
            name: _random_weight(name, weight).to(getattr(torch, dtype)).contiguous()
            for name, weight in InternVLForConditionalGeneration(config).state_dict().items()
        }
    if shape.chat:
        tokenizer.save_pretrained(path)
        (path / "configuration_internvl_chat.py").write_text(_CONFIGURATION)
        (path / "config.json").write_text(
            json.dumps(_published_config(shape, config, dtype), indent=1)
        )
        weights = _published_weights(weights)
    else:
        config.save_pretrained(path)
        _save_processor(path, shape, tokenizer)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def byte_tokenizer(shape: InternVLShape) -> Any:
    """A tokenizer whose tokens are the bytes and InternVL's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    model = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(word, special=True) for word in SPECIALS])
    marker = IMAGE_MARKERS["chat" if shape.chat else "transformers"]
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE.replace("MARKER", marker),
    )
    tokenizer._set_model_specific_special_tokens(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    )
    return tokenizer


def _config(shape: InternVLShape, tokenizer: Any) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config, Qwen3Config

    token = tokenizer.convert_tokens_to_ids
    decoder, name = (Qwen3Config, "Qwen3") if shape.qwen3 else (Qwen2Config, "Qwen2")
    options = {"head_dim": shape.hidden // shape.heads} if shape.qwen3 else {}
    return InternVLConfig(
        architectures=["InternVLForConditionalGeneration"],
        vision_config=InternVLVisionConfig(
            hidden_size=shape.vision_hidden,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            intermediate_size=shape.vision_intermediate,
            image_size=shape.tile_size,
            patch_size=shape.patch_size,
            attention_bias=not shape.large_encoder,
            use_qk_norm=shape.large_encoder,
            norm_type="rms_norm" if shape.large_encoder else "layer_norm",
            use_mean_pooling=True,
        ),
        text_config=decoder(
            architectures=[f"{name}ForCausalLM"],
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            bos_token_id=token("<|endoftext|>"),
            eos_token_id=token("<|im_end|>"),
            tie_word_embeddings=False,
            **options,
        ),
        image_token_id=token("<IMG_CONTEXT>"),
        image_seq_length=shape.tokens_per_tile,
        tie_word_embeddings=False,
    )


def _published_config(shape: InternVLShape, config: Any, dtype: str) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "vision_config": {
            "model_type": "intern_vit_6b",
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "intermediate_size": vision.intermediate_size,
            "image_size": shape.tile_size,
            "patch_size": shape.patch_size,
            "qkv_bias": vision.attention_bias,
            "qk_normalization": vision.use_qk_norm,
            "norm_type": vision.norm_type,
            "layer_norm_eps": vision.layer_norm_eps,
            "hidden_act": vision.hidden_act,
            "initializer_factor": 1.0,
        },
        "llm_config": config.text_config.to_dict(),
        "select_layer": -1,
        "force_image_size": shape.tile_size,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": shape.max_tiles,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }


def _published_weights(weights: dict[str, Any]) -> dict[str, Any]:
    """The weights under their published names, with Q, K and V of the encoder as one weight."""
    import torch

    published = {}
    for name, weight in weights.items():
        if name.startswith("model.vision_tower.") and (".k_proj." in name or ".v_proj." in name):
            continue
        if name.startswith("model.vision_tower.") and ".q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, weight = name.replace("q_proj", "qkv"), torch.cat(parts)
        is_vision = not name.startswith(("model.language_model.", "lm_head."))
        for old, new in [*_PUBLISHED_NAMES.items()][: None if is_vision else 2]:
            name = name.replace(old, new)
        published[name] = weight
    return published


def _save_processor(path: Path, shape: InternVLShape, tokenizer: Any) -> None:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    size = {"height": shape.tile_size, "width": shape.tile_size}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, max_patches=shape.max_tiles
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=shape.tokens_per_tile,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(path)


def _random_weight(name: str, weight: Any) -> Any:
    """A weight scaled by fan-in; a bias, norm or scale large enough to matter if forgotten."""
    import torch

    noise = torch.randn_like(weight)
    if name.endswith(".bias"):
        return 0.3 * noise
    if weight.dim() == 1:
        return 1 + 0.2 * noise
    if weight.dim() == 3 or "embed_tokens" in name:
        return noise
    # Sharp attention: answers depend on single tokens.
    scale = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
    return noise * scale * weight[0].numel() ** -0.5
