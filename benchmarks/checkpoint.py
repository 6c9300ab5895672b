"""What random checkpoints of several model families share: sizes, prompts, tokenizer and weights.

Random weights give nonsense answers, but are enough for tests and speed.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcop_vllm.demo.checkpoint import LlavaShape, save_random_weights


@dataclass(frozen=True, kw_only=True)
class AnySizeShape(LlavaShape):
    """Sizes of a model that takes images of any size.

    ``image_size`` is the height and width of the bench's images.

    Attributes:
        boundaries: ``shallow_boundary`` and ``deep_boundary`` of pruning, if not the default.
    """

    boundaries: tuple[int, int] | None = None

    @property
    def visual_tokens(self) -> int:
        return self.tokens_of(self.image_size, self.image_size)

    @abstractmethod
    def tokens_of(self, width: int, height: int) -> int:
        """V, number of visual tokens of an image of that size."""


SMALL_SIZES: dict[str, Any] = {
    "vision_hidden": 256,
    "vision_layers": 8,
    "vision_heads": 4,
    "hidden": 512,
    "heads": 8,
    "kv_heads": 2,
    "intermediate": 1536,
}
"""Sizes of a model that is small enough for a CPU; decoders are as deep as the published ones."""


def chat_template(image: str, video: str = "") -> str:
    """A template of ChatML prompts, with a model's markers of images and videos."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}"
        f"{{% elif part['type'] == 'video' %}}{video}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def byte_tokenizer(specials: tuple[str, ...]) -> Any:
    """A tokenizer whose tokens are the special tokens and the bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    model = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(word, special=True) for word in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
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


def save_model(
    path: Path,
    model: Any,
    config: Any,
    seed: int,
    dtype: str,
    weight_of: Callable[[str, Any], Any] = random_weight,
) -> None:
    """Write a configuration, and seeded random weights of a torch ``dtype``.

    Args:
        path: Folder of the checkpoint.
        model: Class of transformers.
        config: The model's configuration.
        seed: Seed of the weights.
        dtype: Name of the dtype of the weights, which are drawn in float32.
        weight_of: Makes a random weight of a name and a weight of its shape.
    """
    config.architectures, config.dtype = [model.__name__], dtype
    config.save_pretrained(path)
    config.dtype = "float32"
    save_random_weights(path, lambda: model(config), seed, dtype, weight_of)
