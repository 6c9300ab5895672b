"""Small random LLaVA-1.5 checkpoints in the form Hugging Face and vLLM load.

Random weights answer nonsense; they are right for tests, for cost, and for a first look
at what pruning removes. Everything about the form is real: a CLIP tower with [CLS], a
two-layer projector, Llama decoder layers, a processor and a chat template.
"""

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% endif %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class LlavaShape:
    """Sizes of a LLaVA-1.5 model.

    Attributes:
        image_size: Picture height and width in pixels after preprocessing.
        patch_size: Height and width of a patch in pixels; V = (image_size/patch_size)^2.
        vision_hidden, vision_layers, vision_heads: The CLIP tower.
        hidden, layers, heads, kv_heads, intermediate: The Llama decoder.
        max_positions: Longest sequence the rotary embedding is made for, in tokens.
    """

    image_size: int = 336
    patch_size: int = 14
    vision_hidden: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    hidden: int = 256
    layers: int = 12
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 512
    max_positions: int = 8192

    @property
    def visual_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


DEMO = LlavaShape()
"""What ``make serve`` starts with."""

SMALL = LlavaShape(
    vision_hidden=256,
    vision_layers=12,
    vision_heads=8,
    hidden=1024,
    layers=24,
    heads=16,
    kv_heads=16,
    intermediate=2816,
)
"""Large enough that tokens decide what a prefill costs, small enough for a CPU."""

LLAVA_1_5_7B = LlavaShape(
    vision_hidden=1024,
    vision_layers=24,
    vision_heads=16,
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    intermediate=11008,
)


def save_config(path: Path, shape: LlavaShape) -> int:
    """Write everything but the weights (enough for ``--load-format dummy``).

    Returns:
        The vocabulary size.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    # One token per byte: no corpus, no merges, any text in and out unchanged.
    specials = ["<unk>", "<s>", "</s>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(specials + alphabet)}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens([AddedToken(t, special=True) for t in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
    side = {"height": shape.image_size, "width": shape.image_size}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": shape.image_size}, crop_size=side
        ),
        tokenizer=tokenizer,
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)
    LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_hidden,
            intermediate_size=4 * shape.vision_hidden,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=shape.image_size,
            patch_size=shape.patch_size,
        ),
        text_config=LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=len(vocabulary),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.max_positions,
            bos_token_id=vocabulary["<s>"],
            eos_token_id=vocabulary["</s>"],
            tie_word_embeddings=False,
        ),
        image_token_index=vocabulary["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    ).save_pretrained(path)
    return len(vocabulary)


def save_random_llava(
    path: Path, shape: LlavaShape, *, seed: int = 0, dtype: str = "float32"
) -> None:
    """Write a whole checkpoint with seeded random weights of a torch ``dtype``."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    save_config(path, shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(path))
        state = {}
        for name, weight in model.state_dict().items():
            # transformers 5 drops a level of the tower that vLLM and older files have.
            if name.startswith("model.vision_tower.") and ".vision_model." not in name:
                name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
            if weight.dim() >= 2:
                # Transformers' 0.02 makes every prompt continue alike. Weights scaled by
                # fan-in, and inputs of order one, make keys and answers differ.
                scale = 1.0 if "embed_tokens" in name else weight[0].numel() ** -0.5
                weight = torch.randn_like(weight) * scale
            state[name] = weight.contiguous().to(getattr(torch, dtype))
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def ensure_demo_checkpoint(shape: LlavaShape = DEMO, *, seed: int = 0) -> Path:
    """The random demo checkpoint, made on first use in the user's cache directory."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vitcop-vllm"
    sizes = "-".join(map(str, asdict(shape).values()))
    path = root / f"random-llava-{sizes}-seed{seed}"
    if (path / "model.safetensors").exists():
        return path
    root.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed: two first starts at once do not mix files.
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        made = Path(scratch) / "checkpoint"
        made.mkdir()
        save_random_llava(made, shape, seed=seed)
        try:
            made.rename(path)
        except OSError:
            if not (path / "model.safetensors").exists():
                raise
    return path
