"""Models with three-stage pruning as one dense forward in plain PyTorch, float32.

No cache, no paging, no batching, no vLLM: the whole sequence goes through every layer, and
rows are dropped between stages. Selection, by any selector, is the slow oracle's, written
from the methods' descriptions. Slow and obvious; what the engine must equal.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor

from tests.engine.requests import Answer, RequestSpec, sample_image
from tests.pruning import oracle
from vitcop_vllm.pruning.plan import VisualTokenCounts, plan_counts
from vitcop_vllm.pruning.settings import PruningSettings


@dataclass
class _Seen:
    """Query (T, heads, D) and keys (T, kv_heads, D) of a layer, after rotary embedding."""

    query: torch.Tensor
    keys: torch.Tensor


@dataclass
class _Row:
    """A token alive in some layer.

    Attributes:
        position: Its index in the prompt.
        image: Its image's number in the prompt, if it is a visual token.
        place: What its query and key are rotated by: one number, or one per axis of M-RoPE.
    """

    position: int
    image: int | None
    place: tuple[int, ...]


@dataclass
class Encoded:
    """What is left of an image after Stage I.

    Attributes:
        embeds: (n1, H), the kept tokens, projected.
        labels: Their clusters; empty where nothing is merged.
        offsets: Where each stands, counted on each axis from where the image begins.
        advance: How much farther than the image the text after it begins.
    """

    embeds: torch.Tensor
    labels: list[int]
    offsets: Sequence[tuple[int, ...]]
    advance: int


class DenseModel(ABC):
    """A decoder whose tokens are dropped and merged between stages; an encoder of images.

    Attributes:
        axes: Which number of a token's place each frequency of the rotary embedding takes.
        image_token: The placeholder of a visual token.
    """

    axes: list[int]
    image_token: int
    num_axes: ClassVar[int]

    def __init__(
        self,
        path: Path,
        boundaries: tuple[int, int],
        *,
        renumber_deep: bool = False,
        selector: str = "vitcop",
    ):
        self.config = AutoConfig.from_pretrained(path)
        self.processor = AutoProcessor.from_pretrained(path)
        self.weights = load_file(path / "model.safetensors")
        self.boundaries = boundaries
        self.renumber_deep = renumber_deep
        self.selector = selector

    @abstractmethod
    def encode(self, image: Image.Image, counts: VisualTokenCounts) -> Encoded:
        """The encoder and Stage I."""

    @abstractmethod
    def visual_tokens(self, image: Image.Image) -> int:
        """V, the tokens of an image before Stage I."""

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        if f"{name}.bias" in self.weights:
            return F.layer_norm(x, weight.shape, weight, self.weights[f"{name}.bias"], 1e-5)
        eps = self.config.text_config.rms_norm_eps
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    # The decoder.

    def logits(
        self,
        tokens: list[int],
        images: list[Image.Image],
        counts: list[VisualTokenCounts],
        prompt_length: int,
    ) -> torch.Tensor:
        """(answer tokens, vocabulary): logits after the prompt and each answer token."""
        text = self.config.text_config
        embeds = self.weights["model.language_model.embed_tokens.weight"][torch.tensor(tokens)]
        rows: list[_Row] = []
        labels = []
        place = 0
        for number, (image, one) in enumerate(zip(images, counts, strict=True)):
            start = tokens.index(self.image_token, len(rows))
            place += start - len(rows)
            rows += self.text_rows(range(len(rows), start), place)
            encoded = self.encode(image, one)
            assert len(encoded.embeds) == len(encoded.offsets) == one.stages[0]
            embeds[start : start + one.stages[0]] = encoded.embeds
            for i, offsets in enumerate(encoded.offsets, start):
                rows.append(_Row(i, number, tuple(place + offset for offset in offsets)))
            labels.append(encoded.labels)
            place += encoded.advance
        rows += self.text_rows(range(len(rows), len(tokens)), place + len(tokens) - len(rows))

        x, seen = embeds, None
        places = [row.place for row in rows]
        for layer in range(text.num_hidden_layers):
            if layer == self.boundaries[0]:
                last = prompt_length - 1
                if self.selector == "vitcop":
                    x, rows = self.merge(x, rows, seen, labels, counts)
                else:
                    x, rows = self.drop(x, rows, seen, counts, 1, last)
                places = [row.place for row in rows]
            if layer == self.boundaries[1]:
                compact = {row.position: i for i, row in enumerate(rows)}
                x, rows = self.drop(x, rows, seen, counts, 2, None)
                places = [
                    (compact[row.position],)
                    if self.renumber_deep and row.position < prompt_length
                    else row.place
                    for row in rows
                ]
            x, seen = self.layer(layer, x, places)
        x = self.norm("model.language_model.norm", x)
        answer = len(tokens) - prompt_length + 1
        return self.linear("lm_head", x[-answer:])

    def text_rows(self, positions: range, place: int) -> list[_Row]:
        """Tokens of text in front of ``place``, where the next token stands on every axis."""
        return [_Row(i, None, (place + i - positions.stop,) * self.num_axes) for i in positions]

    def layer(
        self, layer: int, x: torch.Tensor, places: list[tuple[int, ...]]
    ) -> tuple[torch.Tensor, _Seen]:
        text = self.config.text_config
        name = f"model.language_model.layers.{layer}"
        heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
        y = self.norm(f"{name}.input_layernorm", x)
        query = self.linear(f"{name}.self_attn.q_proj", y).unflatten(-1, (heads, -1))
        key = self.linear(f"{name}.self_attn.k_proj", y).unflatten(-1, (kv_heads, -1))
        value = self.linear(f"{name}.self_attn.v_proj", y).unflatten(-1, (kv_heads, -1))
        query, key = self.rotate(query, places), self.rotate(key, places)
        share = heads // kv_heads
        wide_key, wide_value = (t.repeat_interleave(share, dim=1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, wide_key) * query.shape[-1] ** -0.5
        causal = torch.ones(len(x), len(x)).triu(1).bool()
        attention = scores.masked_fill(causal, float("-inf")).softmax(-1)
        y = torch.einsum("hqk,khd->qhd", attention, wide_value).flatten(1)
        x = x + self.linear(f"{name}.self_attn.o_proj", y)
        y = self.norm(f"{name}.post_attention_layernorm", x)
        gate = F.silu(self.linear(f"{name}.mlp.gate_proj", y))
        y = self.linear(f"{name}.mlp.down_proj", gate * self.linear(f"{name}.mlp.up_proj", y))
        return x + y, _Seen(query, key)

    def rotate(self, x: torch.Tensor, places: list[tuple[int, ...]]) -> torch.Tensor:
        half = x.shape[-1] // 2
        theta = self.config.text_config.rope_parameters["rope_theta"]
        frequencies = theta ** -(torch.arange(half, dtype=torch.float32) / half)
        by_frequency = torch.tensor(places, dtype=torch.float32)[:, None, self.axes]
        angle = by_frequency * frequencies
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    # Between stages.

    @staticmethod
    def key_norm(keys: torch.Tensor) -> torch.Tensor:
        return keys.mean(dim=1).norm(dim=-1)

    def merge(self, x, rows, seen, labels, counts):
        norms = self.key_norm(seen.keys)
        out_x, out_rows = [], []
        i = 0
        while i < len(rows):
            number = rows[i].image
            if number is None:
                out_x.append(x[i])
                out_rows.append(rows[i])
                i += 1
                continue
            n1, n2, _ = counts[number].stages
            if n2 == n1:
                out_x.extend(x[i : i + n1])
                out_rows.extend(rows[i : i + n1])
            else:
                output = oracle.stage_two(
                    norms[i : i + n1].numpy(), labels[number], counts[number].centres, n2
                )
                assert len(output) == n2
                for at, members in output:
                    token = x[i + at]
                    if members is not None:
                        token = token + x[[i + m for m in members]].mean(0)
                    out_x.append(token)
                    out_rows.append(rows[i + at])
            i += n1
        return torch.stack(out_x), out_rows

    def drop(self, x, rows, seen, counts, stage, last):
        """``last``: row of the prompt's last token, at the shallow boundary."""
        keep = []
        i = 0
        while i < len(rows):
            number = rows[i].image
            if number is None:
                keep.append(i)
                i += 1
                continue
            before, after = counts[number].stages[stage - 1 : stage + 1]
            span = range(i, i + before)
            chosen = self.choose_tokens(x, seen, span, after, last)
            assert len(chosen) == after
            keep.extend(i + j for j in chosen)
            i += before
        return x[keep], [rows[j] for j in keep]

    def choose_tokens(self, x, seen, span, count, last):
        if count == len(span):
            return list(range(count))
        visual = list(span)
        if self.selector == "fastv":
            scale = seen.query.shape[-1] ** -0.5
            query, keys = seen.query[last].numpy(), seen.keys[: last + 1].numpy()
            return oracle.last_token_attention(query, keys, scale, visual, count)
        if self.selector == "dart":
            states = self.norm("model.language_model.norm", x[visual])
            return oracle.least_duplicated(seen.keys[visual].numpy(), states.numpy(), count)
        assert self.selector in ("vitcop", "key_norm")
        return oracle.smallest(self.key_norm(seen.keys[visual]).tolist(), count)


class DenseLlava(DenseModel):
    """LLaVA-1.5."""

    num_axes = 1

    def __init__(self, path: Path, boundaries: tuple[int, int], **options: Any):
        super().__init__(path, boundaries, **options)
        self.image_token = self.config.image_token_index
        text = self.config.text_config
        self.axes = [0] * (text.hidden_size // text.num_attention_heads // 2)

    def visual_tokens(self, image: Image.Image) -> int:
        config = self.config.vision_config
        return (config.image_size // config.patch_size) ** 2

    def encode(self, image: Image.Image, counts: VisualTokenCounts) -> Encoded:
        """The vision tower, up to the layer whose output LLaVA uses."""
        config = self.config.vision_config
        pixels = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
        tower = "model.vision_tower.vision_model"
        patches = F.conv2d(
            pixels["pixel_values"],
            self.weights[f"{tower}.embeddings.patch_embedding.weight"],
            stride=config.patch_size,
        )
        x = torch.cat(
            (
                self.weights[f"{tower}.embeddings.class_embedding"][None],
                patches[0].flatten(1).T,
            )
        )
        x = x + self.weights[f"{tower}.embeddings.position_embedding.weight"]
        x = self.norm(f"{tower}.pre_layrnorm", x)
        heads = config.num_attention_heads
        for layer in range(config.num_hidden_layers - 1):
            name = f"{tower}.encoder.layers.{layer}"
            y = self.norm(f"{name}.layer_norm1", x)
            query, key, value = (
                self.linear(f"{name}.self_attn.{p}_proj", y).unflatten(-1, (heads, -1))
                for p in "qkv"
            )
            scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
            attention = scores.softmax(-1)
            y = torch.einsum("hqk,khd->qhd", attention, value).flatten(1)
            x = x + self.linear(f"{name}.self_attn.out_proj", y)
            y = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.layer_norm2", x))
            y = y * torch.sigmoid(1.702 * y)
            x = x + self.linear(f"{name}.mlp.fc2", y)
        if self.selector == "received":  # by all tokens, not by [CLS] alone
            saliency = attention[:, :, 1:].mean(1).sum(0)
        else:
            saliency = attention[:, 0, 1:].sum(0)
        kept = self.choose_patches(x[1:], saliency, pixels["pixel_values"], counts.stages[0])
        labels = []
        if counts.centres:
            side = config.image_size // config.patch_size
            labels = oracle.labels(
                key[1:].flatten(1)[kept].numpy(),
                oracle.positions(kept, side, side),
                counts.centres,
            )
        n1 = len(kept)
        return Encoded(self.project(x[1:][kept]), labels, [(i,) for i in range(n1)], n1)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        y = self.linear("model.multi_modal_projector.linear_1", features)
        return self.linear("model.multi_modal_projector.linear_2", F.gelu(y))

    def choose_patches(
        self, features: torch.Tensor, saliency: torch.Tensor, pixels: torch.Tensor, n1: int
    ) -> list[int]:
        patches = len(features)
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        if n1 == patches:
            return list(range(patches))
        match self.selector:
            case "random":
                return oracle.random_subset(pixels.numpy(), patches, n1)
            case "grid":
                return oracle.even_grid(side, side, n1)
            case "divprune":
                return oracle.max_min_diversity(self.project(features).numpy(), n1)
        assert self.selector in ("vitcop", "cls", "received")
        return oracle.largest(saliency.tolist(), n1)


def assert_equals_oracle(
    model: DenseModel, spec: RequestSpec, answer: Answer, settings: PruningSettings | None = None
) -> None:
    """Tokens, unless sampled, and log-probabilities, each given the tokens before it."""
    assert spec.ratio is not None
    layers = model.config.text_config.num_hidden_layers
    images = [sample_image(seed) for seed in spec.images]
    logits = model.logits(
        answer.prompt + answer.tokens[:-1],
        images,
        [
            plan_counts(
                settings or PruningSettings(), spec.ratio, layers, model.visual_tokens(image)
            )
            for image in images
        ],
        len(answer.prompt),
    )
    expected = logits.log_softmax(-1)
    for step, (token, entries) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        assert spec.sampling or token == int(expected[step].argmax())
        for other, logprob in entries.items():
            assert logprob == pytest.approx(float(expected[step, other]), abs=1e-3)
