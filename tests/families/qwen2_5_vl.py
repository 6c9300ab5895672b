"""A tiny random Qwen2.5-VL checkpoint in the form that transformers and vLLM load.

Random weights answer nonsense, but everything about the form is real: a vision tower with
windowed and full attention, a 2x2 merger, a decoder with M-RoPE and grouped-query heads, and a
processor for images and videos.
"""

from pathlib import Path
from typing import Any

PATCH = 14
MERGED = 2 * PATCH
"""Pixels along a side of one visual token."""

SMALLEST, LARGEST = 4 * MERGED**2, 320 * MERGED**2
"""Pixels of an image after resizing: 4 to 320 visual tokens."""

LAYERS = 8

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def grid(width: int, height: int) -> tuple[int, int]:
    """Rows and columns of visual tokens of an image of that size."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    height, width = smart_resize(height, width, MERGED, SMALLEST, LARGEST)
    return height // MERGED, width // MERGED


def save_checkpoint(path: Path, *, seed: int = 0) -> None:
    """Write configuration, processor and seeded random float32 weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer = byte_tokenizer()
    config = new_config(tokenizer)
    config.save_pretrained(path)
    save_processor(path, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        weights = {name: random_weight(name, w) for name, w in model.state_dict().items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def new_config(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            # Windows of 3x3 visual tokens: most grids end in windows that are cut off.
            "window_size": 3 * MERGED,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 128,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            # So low a base that a wrong row or column changes the answer in every frequency.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    config.dtype = "float32"
    return config


def byte_tokenizer() -> Any:
    """Every byte is a token, and so is each of Qwen's special words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    model = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(word, special=True) for word in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def save_processor(path: Path, tokenizer: Any) -> None:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    sizes = {
        "patch_size": PATCH,
        "size": {"shortest_edge": SMALLEST, "longest_edge": LARGEST},
    }
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)


def random_weight(name: str, weight: Any) -> Any:
    """Weights scaled by fan-in, biases and norms that cannot be left out unnoticed.

    Transformers' own scale of 0.02 makes every prompt continue alike.
    """
    import torch

    noise = torch.randn_like(weight)
    if name.endswith(".bias"):
        return 0.3 * noise
    if weight.dim() == 1:
        return 1 + 0.2 * noise
    if "embed_tokens" in name:
        return noise
    # Attention so sharp that answers depend on single tokens.
    scale = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
    return noise * scale * weight[0].numel() ** -0.5
