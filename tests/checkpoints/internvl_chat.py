"""Random InternVL checkpoints in the published form, ``InternVLChatModel``.

Its configuration is Python code in the checkpoint.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.checkpoint import chat_template
from benchmarks.internvl_checkpoint import InternVLShape, internvl_tokenizer, save_random_internvl

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


def save_random_internvl_chat(
    path: Path, shape: InternVLShape, *, seed: int = 0, dtype: str = "float32"
) -> None:
    """Write a whole checkpoint with seeded random weights of a torch ``dtype``."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    with TemporaryDirectory() as scratch:
        save_random_internvl(Path(scratch), shape, seed=seed, dtype=dtype)
        config = AutoConfig.from_pretrained(scratch)
        weights = load_file(Path(scratch) / "model.safetensors")
    tokenizer = internvl_tokenizer()
    tokenizer.chat_template = chat_template("<image>\n")
    tokenizer.save_pretrained(path)
    (path / "configuration_internvl_chat.py").write_text(_CONFIGURATION)
    published = _published_config(shape, config, dtype)
    (path / "config.json").write_text(json.dumps(published, indent=1))
    save_file(_published_weights(weights), path / "model.safetensors", metadata={"format": "pt"})


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
