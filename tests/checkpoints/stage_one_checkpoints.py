"""Random checkpoints of models that Stage I alone prunes. For tests."""

from pathlib import Path
from typing import Any

from benchmarks.checkpoint import byte_tokenizer, chat_template, random_weight, save_model
from benchmarks.qwen_checkpoint import MERGE, SPECIALS, save_processor, token_ids
from tests.checkpoints import tiny

GEMMA_IMAGE, GEMMA_TOKENS = "<start_of_image>", 64
"""Marks an image in a prompt of Gemma 3, and its visual tokens."""

GEMMA_SPECIALS = ("<pad>", "<eos>", "<bos>", GEMMA_IMAGE, "<end_of_image>", "<image_soft_token>")

QWEN_LAYERS = 4

MISTRAL_SPECIALS = ("<unk>", "<s>", "</s>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>")


def save_random_gemma3(path: Path, *, seed: int = 0) -> None:
    """Write a Gemma 3: 256 patches, 64 visual tokens, two of three layers with a window."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = _gemma_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        vision_config={
            "image_size": 224,
            "patch_size": 14,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "vision_use_head": False,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "max_position_embeddings": 4096,
            "sliding_window": 96,
            "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
            "bos_token_id": token("<bos>"),
            "eos_token_id": token("<eos>"),
            "pad_token_id": token("<pad>"),
            "tie_word_embeddings": False,
        },
        mm_tokens_per_image=GEMMA_TOKENS,
        boi_token_index=token(GEMMA_IMAGE),
        eoi_token_index=token("<end_of_image>"),
        image_token_index=token("<image_soft_token>"),
        # With the embeddings of the input, an untrained model repeats the last token.
        tie_word_embeddings=False,
    )
    _save_gemma_processor(path, tokenizer)
    save_model(path, Gemma3ForConditionalGeneration, config, seed, "float32", _gemma_weight)


def _gemma_weight(name: str, weight: Any) -> Any:
    """Gemma's norms scale by 1 + weight, and its embeddings by the root of the width."""
    random = random_weight(name, weight)
    if "embed_tokens" in name:
        return random * weight.shape[1] ** -0.5
    if name.endswith("norm.weight") and ("language_model" in name or "soft_emb" in name):
        return random - 1
    if name.endswith("mm_input_projection_weight"):  # (inputs, outputs)
        return random * (weight.shape[1] / weight.shape[0]) ** 0.5
    return random


def _gemma_tokenizer() -> Any:
    tokenizer = byte_tokenizer(GEMMA_SPECIALS)
    tokenizer.add_tokens(["\n" * count for count in range(1, 5)])
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token = "<eos>", "<pad>", "<bos>"
    tokenizer._set_model_specific_special_tokens(
        {
            "boi_token": GEMMA_IMAGE,
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        }
    )
    return tokenizer


def _save_gemma_processor(path: Path, tokenizer: Any) -> None:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 224, "width": 224}),
        tokenizer=tokenizer,
        chat_template=chat_template(GEMMA_IMAGE),
        image_seq_length=GEMMA_TOKENS,
    ).save_pretrained(path)


def save_random_qwen3_5(path: Path, *, seed: int = 0, experts: int = 0) -> None:
    """Write a Qwen3.5, bfloat16: three of four layers have linear attention.

    Args:
        path: Folder of the checkpoint.
        seed: Seed of the weights.
        experts: Experts of each layer, 0 for a dense model. All compute each token: a router in
            bfloat16 could choose others than the same router in float32.
    """
    import transformers

    shape = tiny.QWEN3_MOE
    tokenizer = byte_tokenizer(SPECIALS)
    token = tokenizer.convert_tokens_to_ids
    kind = "Qwen3_5Moe" if experts else "Qwen3_5"
    of_experts = {
        "num_experts": experts,
        "num_experts_per_tok": experts,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    }
    config = getattr(transformers, f"{kind}Config")(
        vision_config={**shape.vision_sizes(), "num_position_embeddings": shape.learned_side**2},
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            **(of_experts if experts else {"intermediate_size": 256}),
            "num_hidden_layers": QWEN_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
        },
        **token_ids(tokenizer),
    )
    processors = transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor
    save_processor(path, shape, tokenizer, *processors)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")
    save_model(path, model, config, seed, "bfloat16", _qwen_weight)


def _qwen_weight(name: str, weight: Any) -> Any:
    """Transformers' own decays of linear attention: random ones forget everything."""
    if name.endswith(("A_log", "dt_bias")):
        return weight
    random = random_weight(name, weight)
    # Of experts' matrices, ``random_weight`` takes the whole for fan-in.
    return random * weight.shape[1] ** 0.5 if ".experts." in name else random


def save_random_mistral3(path: Path, *, seed: int = 0) -> None:
    """Write a Mistral3: images of up to 280 pixels, visual tokens of 28 pixels."""
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
    )

    patch, longest = 14, 280
    tokenizer = byte_tokenizer(MISTRAL_SPECIALS)
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token = "</s>", "<pad>", "<s>"
    token = tokenizer.convert_tokens_to_ids
    config = Mistral3Config(
        vision_config={
            "model_type": "pixtral",
            "image_size": longest,
            "patch_size": patch,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "head_dim": 32,
            "hidden_act": "silu",
        },
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            "sliding_window": None,
            "bos_token_id": token("<s>"),
            "eos_token_id": token("</s>"),
            "tie_word_embeddings": False,
        },
        image_token_index=token("[IMG]"),
        spatial_merge_size=MERGE,
        tie_word_embeddings=False,
    )
    PixtralProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": longest}, patch_size={"height": patch, "width": patch}
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        spatial_merge_size=MERGE,
        chat_template=chat_template("[IMG]"),
    ).save_pretrained(path)
    save_model(path, Mistral3ForConditionalGeneration, config, seed, "float32")
