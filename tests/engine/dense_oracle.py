"""Models with three-segment pruning as one dense forward in plain PyTorch, float32.

No cache, no paging, no batching, no vLLM: the whole sequence goes through every layer, and
rows are dropped between segments. ``tests.pruning.oracle`` selects the kept tokens. The code is
slow and obvious; the engine must give the same log-probabilities.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
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
class _AttentionInputs:
    """What attends in a layer.

    Attributes:
        query: (T, heads, D), after rotary embedding.
        keys: (T, kv_heads, D), after rotary embedding.
        raw_keys: (T, kv_heads, D), as projected.
        values: (T, kv_heads, D).
    """

    query: torch.Tensor
    keys: torch.Tensor
    raw_keys: torch.Tensor
    values: torch.Tensor


@dataclass
class _Row:
    """A token that a layer computes.

    Attributes:
        position: Index in the prompt.
        image: Number of its image in the prompt; ``None`` for text.
        place: Position for the rotary embedding: one number, or one per axis of M-RoPE.
    """

    position: int
    image: int | None
    place: tuple[int, ...]


@dataclass
class Encoded:
    """The tokens of an image that Stage I keeps.

    Attributes:
        embeds: (n1, H), projected.
        labels: Cluster of each token; empty if Stage II merges nothing.
        offsets: Rotary position of each token on each axis, relative to the image's start.
        advance: Rotary position of the next text token, relative to the image's start.
        deepstack: (n1, H) features that are added after each of the first layers.
    """

    embeds: torch.Tensor
    labels: list[int]
    offsets: Sequence[tuple[int, ...]]
    advance: int
    deepstack: Sequence[torch.Tensor] = ()


@dataclass
class Tile:
    """What the vision tower makes of one tile, without [CLS].

    Attributes:
        features: (P, C) output of the layer that LLaVA uses.
        saliency: (P,) saliency of each patch.
        keys: (P, heads * D) keys of that layer.
    """

    features: torch.Tensor
    saliency: torch.Tensor
    keys: torch.Tensor


class DenseModel(ABC):
    """An image encoder, and a decoder that drops and merges tokens between segments.

    Attributes:
        axes: Axis of each rotary frequency: an index into a token's ``place``.
        image_token: Id of the placeholder token.
        video_token: Id of that of videos, if the model takes videos.
        settings: Settings of pruning, except the selector.
        layer_norm_eps: Of norms with a bias.
        compares_frames: Whether frames of videos are compared with the frame before.
    """

    axes: list[int]
    image_token: int
    video_token: int | None = None
    num_axes: ClassVar[int]
    settings: ClassVar[PruningSettings] = PruningSettings(decoder_signal="keys")
    layer_norm_eps: ClassVar[float] = 1e-5
    compares_frames = False

    def __init__(
        self,
        path: Path,
        boundaries: tuple[int, int],
        *,
        renumber_deep: bool = False,
        selector: str = "vitcop",
        signal: str | None = None,
    ):
        self.signal = signal or self.settings.decoder_signal
        self.config = AutoConfig.from_pretrained(path)
        self.processor = AutoProcessor.from_pretrained(path)
        self.weights = load_file(path / "model.safetensors")
        self.boundaries = boundaries
        self.renumber_deep = renumber_deep
        self.selector = selector

    @abstractmethod
    def encode(self, image: Image.Image, counts: VisualTokenCounts) -> Encoded:
        """Run the encoder and Stage I."""

    @abstractmethod
    def visual_tokens(self, image: Image.Image) -> int:
        """V, the number of an image's tokens before Stage I."""

    def plan(self, settings: PruningSettings, ratio: float, image: Any) -> VisualTokenCounts:
        """Counts of an image, or of a frame of a video."""
        layers = self.config.text_config.num_hidden_layers
        return plan_counts(settings, ratio, layers, self.visual_tokens(image))

    def ratio_of_frame(self, ratio: float, num_tokens: int, number: int, num_frames: int) -> float:
        """Ratio of frame ``number`` of a video, each of ``num_tokens`` before Stage I."""
        if not self.compares_frames or num_frames == 1 or ratio == 0:
            return ratio
        keep = 1 - ratio
        first = max(keep, min(keep * (1.5 if num_frames == 2 else 2), 1 - 1 / num_tokens))
        others = (num_frames * keep - first) / (num_frames - 1)
        return 1 - (others if number else first)

    def images(self, spec: RequestSpec) -> list[Any]:
        """What a request's prompt has counts for, in its order: images, and frames of videos."""
        assert not spec.videos
        return [sample_image(seed) for seed in spec.images]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        if f"{name}.bias" in self.weights:
            return F.layer_norm(
                x, weight.shape, weight, self.weights[f"{name}.bias"], self.layer_norm_eps
            )
        eps = self.config.text_config.rms_norm_eps
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    # The decoder.

    def logits(
        self,
        tokens: list[int],
        images: list[Any],
        counts: list[VisualTokenCounts],
        prompt_length: int,
    ) -> torch.Tensor:
        """(1 + answer tokens, vocabulary): logits after the prompt and after each answer token."""
        text = self.config.text_config
        embeds = self.weights["model.language_model.embed_tokens.weight"][torch.tensor(tokens)]
        rows: list[_Row] = []
        labels = []
        deepstack: dict[int, torch.Tensor] = {}
        place = 0
        for number, (image, image_counts) in enumerate(zip(images, counts, strict=True)):
            placeholders = (self.image_token, self.video_token)
            start = next(i for i in range(len(rows), len(tokens)) if tokens[i] in placeholders)
            place += start - len(rows)
            rows += self.text_rows(range(len(rows), start), place)
            encoded = self.encode(image, image_counts)
            assert len(encoded.embeds) == len(encoded.offsets) == image_counts.stages[0]
            embeds[start : start + len(encoded.embeds)] = encoded.embeds
            for i, offsets in enumerate(encoded.offsets, start):
                rows.append(_Row(i, number, tuple(place + offset for offset in offsets)))
            labels.append(encoded.labels)
            for level, features in enumerate(encoded.deepstack):
                added = deepstack.setdefault(level, torch.zeros_like(embeds))
                added[start : start + len(features)] = features
            place += encoded.advance
        rows += self.text_rows(range(len(rows), len(tokens)), place + len(tokens) - len(rows))

        x, last_layer = embeds, None
        places = [row.place for row in rows]
        for layer in range(text.num_hidden_layers):
            if layer == self.boundaries[0]:
                last = prompt_length - 1
                if self.selector == "vitcop":
                    x, rows = self.merge(x, rows, last_layer, labels, counts)
                else:
                    x, rows = self.drop(x, rows, last_layer, counts, 1, last)
                places = [row.place for row in rows]
            if layer == self.boundaries[1]:
                compact = {row.position: i for i, row in enumerate(rows)}
                x, rows = self.drop(x, rows, last_layer, counts, 2, None)
                places = [
                    (compact[row.position],)
                    if self.renumber_deep and row.position < prompt_length
                    else row.place
                    for row in rows
                ]
            x, last_layer = self.layer(layer, x, places)
            if layer in deepstack:
                x = x + deepstack[layer]
        x = self.norm("model.language_model.norm", x)
        answer = len(tokens) - prompt_length + 1
        return self.linear("lm_head", x[-answer:])

    def text_rows(self, positions: range, place: int) -> list[_Row]:
        """Rows of text tokens; the token after them has position ``place`` on every axis."""
        return [_Row(i, None, (place + i - positions.stop,) * self.num_axes) for i in positions]

    def layer(
        self, layer: int, x: torch.Tensor, places: list[tuple[int, ...]]
    ) -> tuple[torch.Tensor, _AttentionInputs]:
        text = self.config.text_config
        name = f"model.language_model.layers.{layer}"
        heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
        y = self.norm(f"{name}.input_layernorm", x)
        query = self.linear(f"{name}.self_attn.q_proj", y).unflatten(-1, (heads, -1))
        key = raw = self.linear(f"{name}.self_attn.k_proj", y).unflatten(-1, (kv_heads, -1))
        if f"{name}.self_attn.k_norm.weight" in self.weights:
            query = self.norm(f"{name}.self_attn.q_norm", query)
            key = self.norm(f"{name}.self_attn.k_norm", key)
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
        return x + self.mlp(f"{name}.mlp", y), _AttentionInputs(query, key, raw, value)

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self.linear(f"{name}.gate_proj", x))
        return self.linear(f"{name}.down_proj", gate * self.linear(f"{name}.up_proj", x))

    def rotate(self, x: torch.Tensor, places: list[tuple[int, ...]]) -> torch.Tensor:
        half = x.shape[-1] // 2
        theta = self.config.text_config.rope_parameters["rope_theta"]
        frequencies = theta ** -(torch.arange(half, dtype=torch.float32) / half)
        by_frequency = torch.tensor(places, dtype=torch.float32)[:, None, self.axes]
        angle = by_frequency * frequencies
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    # Between segments.

    def scores(self, layer: _AttentionInputs, span: range) -> np.ndarray:
        """Score of each token of a span; a smaller score is more salient."""
        rows = list(span)
        match self.signal:
            case "keys":
                return oracle.key_norms(layer.keys[rows].numpy())
            case "raw_keys":
                return oracle.key_norms(layer.raw_keys[rows].numpy())
            case "values":
                return oracle.value_scores(layer.values[rows].numpy())
        assert self.signal == "image_attention"
        scale = layer.query.shape[-1] ** -0.5
        return oracle.image_attention_scores(
            layer.query[rows].numpy(), layer.keys[rows].numpy(), scale
        )

    def merge(self, x, rows, last_layer, labels, counts):
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
                scores = self.scores(last_layer, range(i, i + n1))
                output = oracle.stage_two(scores, labels[number], counts[number].centres, n2)
                assert len(output) == n2
                for at, members in output:
                    token = x[i + at]
                    if members is not None:
                        token = token + x[[i + m for m in members]].mean(0)
                    out_x.append(token)
                    out_rows.append(rows[i + at])
            i += n1
        return torch.stack(out_x), out_rows

    def drop(self, x, rows, last_layer, counts, segment, last):
        """``last``: row of the prompt's last token; ``None`` at the deep boundary."""
        keep = []
        i = 0
        while i < len(rows):
            number = rows[i].image
            if number is None:
                keep.append(i)
                i += 1
                continue
            before, after = counts[number].stages[segment - 1 : segment + 1]
            span = range(i, i + before)
            chosen = self.choose_tokens(x, last_layer, span, after, last)
            assert len(chosen) == after
            keep.extend(i + j for j in chosen)
            i += before
        return x[keep], [rows[j] for j in keep]

    def choose_tokens(self, x, last_layer, span, count, last):
        if count == len(span):
            return list(range(count))
        visual = list(span)
        if self.selector == "fastv":
            scale = last_layer.query.shape[-1] ** -0.5
            query, keys = last_layer.query[last].numpy(), last_layer.keys[: last + 1].numpy()
            return oracle.last_token_attention(query, keys, scale, visual, count)
        if self.selector == "dart":
            states = self.norm("model.language_model.norm", x[visual])
            return oracle.least_duplicated(last_layer.keys[visual].numpy(), states.numpy(), count)
        if self.selector == "contrast":
            query, keys = last_layer.query[visual].numpy(), last_layer.keys[visual].numpy()
            scale = last_layer.query.shape[-1] ** -0.5
            scores = oracle.image_attention_scores(query, keys, scale)
            return oracle.smallest(scores.tolist(), count)
        assert self.selector in ("vitcop", "key_norm")
        return oracle.smallest(self.scores(last_layer, span).tolist(), count)


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
        """Run the vision tower, then Stage I."""
        config = self.config.vision_config
        pixels = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
        tile = self.run_tower(pixels["pixel_values"])
        kept = self.choose_patches(
            tile.features, tile.saliency, pixels["pixel_values"], counts.stages[0]
        )
        labels = []
        if counts.centres:
            side = config.image_size // config.patch_size
            labels = oracle.labels(
                tile.keys[kept].numpy(), oracle.positions(kept, side, side), counts.centres
            )
        n1 = len(kept)
        return Encoded(self.project(tile.features[kept]), labels, [(i,) for i in range(n1)], n1)

    def run_tower(self, pixels: torch.Tensor) -> Tile:
        """Run the vision tower up to the layer whose output LLaVA uses.

        Args:
            pixels: (1, 3, height, width) of one tile.
        """
        config = self.config.vision_config
        tower = "model.vision_tower.vision_model"
        patches = F.conv2d(
            pixels,
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
        if self.selector == "received":  # attention from all tokens, not from [CLS] alone
            saliency = attention[:, :, 1:].mean(1).sum(0)
        else:
            saliency = attention[:, 0, 1:].sum(0)
        return Tile(x[1:], saliency, key[1:].flatten(1))

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
            case "contrast":
                return oracle.contrasting(
                    self.project(features).numpy(), saliency.tolist(), side, side, n1
                )
        assert self.selector in ("vitcop", "cls", "received")
        return oracle.largest(saliency.tolist(), n1)


def assert_equals_oracle(
    model: DenseModel, spec: RequestSpec, answer: Answer, settings: PruningSettings | None = None
) -> None:
    """Compare an answer's log-probabilities, and its tokens if decoding was greedy.

    The oracle gets the answer's own tokens, so one difference does not change later steps.
    """
    assert spec.ratio is not None
    images = model.images(spec)
    logits = model.logits(
        answer.prompt + answer.tokens[:-1],
        images,
        [model.plan(settings or model.settings, spec.ratio, image) for image in images],
        len(answer.prompt),
    )
    expected = logits.log_softmax(-1)
    for step, (token, entries) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        assert spec.sampling or token == int(expected[step].argmax())
        for other, logprob in entries.items():
            assert logprob == pytest.approx(float(expected[step, other]), abs=1e-3)
