"""Writes LLaVA-1.5 checkpoints that Hugging Face and vLLM load, and locates the demo model.

A checkpoint has a CLIP tower with [CLS], a two-layer projector, Llama decoder layers, a processor
and a chat template. Random weights give meaningless answers, but suffice for tests and for
measurements of speed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcop_vllm.demo.tokenizer import byte_tokenizer

if TYPE_CHECKING:
    import torch

DEMO_NAME = "demo"
"""Name of the demo model on the command line and in configurations."""

DEMO_MODEL = Path(__file__).parent / "model"
"""Folder of the demo model, which ``demo.train`` trained."""

FEATURE_LAYER = -2
"""Index of the vision tower's hidden states that LLaVA-1.5 reads."""

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


@dataclass(frozen=True, kw_only=True)
class LlavaShape:
    """Sizes of a LLaVA-1.5 model.

    Attributes:
        image_size: Image height and width in pixels after preprocessing.
        patch_size: Height and width of a patch in pixels; V = (image_size/patch_size)^2.
        vision_hidden, vision_layers, vision_heads: Sizes of the CLIP tower.
        vision_intermediate: Width of its MLP; 0 is four times ``vision_hidden``.
        hidden, layers, heads, kv_heads, intermediate: Sizes of the Llama decoder.
        max_positions: Longest sequence in tokens.
        rope_theta: Base of the rotary embedding's wavelengths.
        vocabulary: Minimum rows of the embedding; it has at least one row per token.
    """

    image_size: int = 336
    patch_size: int = 14
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_intermediate: int = 0
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    max_positions: int = 4096
    rope_theta: float = 10_000.0
    vocabulary: int = 0

    @property
    def visual_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def vision_sizes(self) -> dict[str, int]:
        """Arguments of the encoder's configuration; without ``image_size``."""
        return {
            "hidden_size": self.vision_hidden,
            "intermediate_size": self.vision_intermediate or 4 * self.vision_hidden,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_heads,
            "patch_size": self.patch_size,
        }

    def decoder_sizes(self, tokenizer: Any, vocabulary_size: int = 0) -> dict[str, Any]:
        """Arguments of the decoder's configuration.

        Args:
            tokenizer: The model's tokenizer.
            vocabulary_size: Minimum rows of the embedding, if larger than the shape's.
        """
        return {
            "vocab_size": max(len(tokenizer), vocabulary_size, self.vocabulary),
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": False,
        }


TINY = LlavaShape(
    image_size=224,
    vision_hidden=64,
    vision_layers=3,
    vision_heads=2,
    hidden=128,
    layers=8,
    heads=4,
    kv_heads=2,
    intermediate=256,
)
"""256 visual tokens and grouped-query heads, for tests and soak runs."""

DEMO = LlavaShape(
    vision_hidden=256,
    vision_layers=6,
    vision_heads=4,
    hidden=192,
    layers=16,
    heads=3,
    kv_heads=3,
    intermediate=384,
    # Heads are narrow. With a larger base, fewer of their channels depend on position.
    rope_theta=500_000.0,
)
"""The demo model: large enough to answer, small enough for a package."""

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
"""Large enough that a prefill's time grows with its tokens, small enough for a CPU."""

LLAVA_1_5_7B = LlavaShape(
    vision_hidden=1024,
    vision_layers=24,
    vision_heads=16,
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    intermediate=11008,
    vocabulary=32064,
)

LLAVA_1_5_13B = LlavaShape(
    vision_hidden=1024,
    vision_layers=24,
    vision_heads=16,
    hidden=5120,
    layers=40,
    heads=40,
    kv_heads=40,
    intermediate=13824,
    vocabulary=32064,
)


def save_config(
    path: Path, shape: LlavaShape, tokenizer: Any = None, vocabulary_size: int = 0
) -> None:
    """Write a checkpoint without weights, enough for ``--load-format dummy``.

    Args:
        path: Folder to write to.
        shape: Sizes of the model.
        tokenizer: By default, a tokenizer in which every byte is a token.
        vocabulary_size: Minimum rows of the embedding, if larger than the shape's.
    """
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
    )

    if tokenizer is None:
        tokenizer = byte_tokenizer()
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
        vision_config=CLIPVisionConfig(image_size=shape.image_size, **shape.vision_sizes()),
        text_config=LlamaConfig(
            architectures=["LlamaForCausalLM"],
            **shape.decoder_sizes(tokenizer, vocabulary_size),
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    ).save_pretrained(path)


def save_random_llava(
    path: Path, shape: LlavaShape, *, seed: int = 0, dtype: str = "float32"
) -> None:
    """Write a checkpoint with seeded random weights. ``dtype`` is the name of a torch dtype."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    save_config(path, shape)
    config = LlavaConfig.from_pretrained(path)
    save_random_weights(path, lambda: LlavaForConditionalGeneration(config), seed, dtype)


def random_matrix(name: str, weight: "torch.Tensor") -> "torch.Tensor":
    """A random weight scaled by fan-in; vectors, such as biases, stay as transformers makes them.

    With transformers' standard deviation of 0.02, all prompts get the same answer.
    """
    import torch

    if weight.dim() < 2:
        return weight
    scale = 1.0 if "embed_tokens" in name else weight[0].numel() ** -0.5
    return torch.randn_like(weight) * scale


def save_random_weights(
    path: Path,
    make_model: Callable[[], Any],
    seed: int,
    dtype: str,
    weight_of: Callable[[str, Any], Any] = random_matrix,
) -> None:
    """Write seeded random weights for a model of transformers.

    Args:
        path: Folder of the checkpoint.
        make_model: Makes the model.
        seed: Seed of the weights.
        dtype: Name of the weights' torch dtype.
        weight_of: Makes a random weight of a name and a weight of its shape.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = {
            name: weight_of(name, weight).to(getattr(torch, dtype))
            for name, weight in make_model().state_dict().items()
        }
    save_weights(path, state)


def save_weights(path: Path, state: Mapping[str, "torch.Tensor"]) -> None:
    """Write a model's ``state_dict`` under the names that vLLM and transformers load."""
    from safetensors.torch import save_file

    tower = "model.vision_tower."
    # transformers 5 dropped a level of the names of CLIP and SigLIP that vLLM and older files have.
    renames = any(name.startswith(f"{tower}encoder.layers.") for name in state)
    named = {}
    for name, weight in state.items():
        if renames and name.startswith(tower):
            name = name.replace(tower, f"{tower}vision_model.", 1)
        named[name] = weight.detach().cpu().contiguous()
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})


def resolve(model: str) -> str:
    """The folder of the demo model if ``model`` is its name, else ``model``."""
    return str(DEMO_MODEL) if model == DEMO_NAME else model
