"""LLaVA-1.5 with visual tokens dropped in three stages."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from transformers import BatchFeature
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.inputs import MultiModalHashes
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import (
    ImageEmbeddingItems,
    ImageProcessorItems,
    MultiModalDataItems,
)
from vllm.multimodal.processing import PromptReplacement, PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs

from vitcop_vllm.engine.config import settings_of
from vitcop_vllm.engine.metrics import SELECTION_SECONDS
from vitcop_vllm.models.patch_choice import (
    Chosen,
    ChosenPatches,
    batch_of,
    members_of,
    rows_that_stay,
    watching,
)
from vitcop_vllm.models.staged_decoder import StagedDecoder, mean_over_ranks
from vitcop_vllm.pruning.budgets import SELECTORS
from vitcop_vllm.pruning.clustering import cluster_labels
from vitcop_vllm.pruning.identity import EXPLAIN_KEY, explained_identifier, tag_identifier
from vitcop_vllm.pruning.plan import VisualTokenCounts, plan_counts
from vitcop_vllm.pruning.saliency import cls_saliency, patch_positions
from vitcop_vllm.pruning.selectors import EncoderView, select_patches
from vitcop_vllm.pruning.settings import RATIO_KEY, PruningSettings
from vitcop_vllm.worker.explain import PatchChoice
from vitcop_vllm.worker.step import StagedForward

COUNTS_FIELD = "visual_token_counts"
"""Name under which a picture's counts reach the encoder: V, K, n1, n2, n3."""


class PrunedLlavaProcessingInfo(LlavaProcessingInfo):
    """What the processor knows of the model, and of pruning."""

    @cached_property
    def settings(self) -> PruningSettings:
        return settings_of(self.get_hf_config())

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Budgets are for the largest picture a request may ask for: one not pruned."""
        return {"image": self.get_max_image_tokens()}

    def counts(
        self, num_image_tokens: int, processor_kwargs: Mapping[str, object]
    ) -> VisualTokenCounts:
        """Counts of one picture under a request's processor keywords.

        Raises:
            ValueError: If the ratio among them is not acceptable.
        """
        settings = self.settings
        ratio = settings.default_ratio
        if RATIO_KEY in processor_kwargs:
            ratio = settings.parse_ratio(processor_kwargs[RATIO_KEY])
        config: Any = self.get_hf_config()
        return plan_counts(settings, ratio, config.text_config.num_hidden_layers, num_image_tokens)

    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of a picture's patches, V in all."""
        vision: Any = self.get_hf_config().vision_config
        side = vision.image_size // vision.patch_size
        return side, side

    def visible_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """What the encoder sees of a picture: left, top, right, bottom, in its own pixels.

        CLIP's processor scales the shorter side to the model's input and crops the middle.
        Where the picture is not cropped it is seen whole.
        """
        processor: Any = self.get_hf_processor().image_processor
        size, crop = dict(processor.size), dict(processor.crop_size or {})
        if not (processor.do_resize and processor.do_center_crop and size.get("shortest_edge")):
            return 0.0, 0.0, float(width), float(height)
        shorter = min(width, height)
        edges = []
        for side, cropped in ((width, crop["width"]), (height, crop["height"])):
            resized = _resized_side(size["shortest_edge"], side, shorter)
            first = (resized - cropped) // 2
            edges.append((first * side / resized, (first + cropped) * side / resized))
        (left, right), (top, bottom) = edges
        return left, top, right, bottom


def _resized_side(shortest_edge: int, side: int, shorter: int) -> int:
    # As the processor of Hugging Face rounds.
    return shortest_edge if side == shorter else int(shortest_edge * side / shorter)


def _theirs(processor_kwargs: Mapping[str, object]) -> dict[str, object]:
    """What is meant for the processor of Hugging Face."""
    return {k: v for k, v in processor_kwargs.items() if k not in (RATIO_KEY, EXPLAIN_KEY)}


class PrunedLlavaMultiModalProcessor(LlavaMultiModalProcessor):
    """Lays out a prompt for the tokens a picture keeps, and names the picture so."""

    info: PrunedLlavaProcessingInfo

    def _image_counts(
        self, mm_items: MultiModalDataItems, processor_kwargs: Mapping[str, object]
    ) -> list[VisualTokenCounts]:
        images = mm_items.get("image")
        if images is None:
            return []
        if isinstance(images, ImageEmbeddingItems):
            if processor_kwargs.get(RATIO_KEY):
                raise ValueError(
                    f"{RATIO_KEY} needs pictures: image embeddings have no [CLS] attention "
                    "to prune by"
                )
            sizes = [images.get_feature_size(i) for i in range(images.get_count())]
            return [VisualTokenCounts.unpruned(size) for size in sizes]
        counts = []
        for i in range(images.get_count()):
            if images.get(i) is None:
                # Sent by its uuid alone: vLLM has it cached. All pictures are scaled alike.
                tokens = self.info.get_max_image_tokens()
            else:
                size = images.get_image_size(i)
                tokens = self.info.get_num_image_tokens(
                    image_width=size.width, image_height=size.height
                )
            counts.append(self.info.counts(tokens, processor_kwargs))
        return counts

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """Inputs for memory profiling: pictures that are not pruned."""
        return replace(
            super().get_dummy_inputs(*args, **kwargs), hf_processor_mm_kwargs={RATIO_KEY: 0}
        )

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> MultiModalHashes:
        # The counts tell pictures apart; the ratio itself would split equal counts.
        plain = _theirs(inputs.hf_processor_mm_kwargs)
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=plain))
        counts = self._image_counts(inputs.mm_data_items, inputs.hf_processor_mm_kwargs)
        if "image" in hashes:
            hashes["image"] = [
                tag_identifier(mm_hash, one)
                for mm_hash, one in zip(hashes["image"], counts, strict=True)
            ]
        request = inputs.hf_processor_mm_kwargs.get(EXPLAIN_KEY)
        images = inputs.mm_data_items.get("image")
        if request is not None and isinstance(images, ImageProcessorItems):
            hashes["image"] = [
                explained_identifier(str(request), i, images.get_image_size(i), name)
                for i, name in enumerate(hashes["image"])
            ]
        return hashes

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        processed = super()._apply_hf_processor_main(mm_items, _theirs(hf_kwargs))
        if "pixel_values" in processed:
            counts = self._image_counts(mm_items, hf_kwargs)
            processed[COUNTS_FIELD] = torch.tensor(
                [[one.encoder, one.centres, *one.stages] for one in counts]
            )
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            **super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs),
            # On the CPU: the encoder needs them as shapes, without waiting for a device.
            COUNTS_FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token = self.info.get_hf_config().image_token_index
        counts = self._image_counts(mm_items, hf_processor_mm_kwargs)
        return [
            PromptReplacement(
                modality="image",
                target=[token],
                replacement=lambda i: [token] * counts[i].stages[0],
            )
        ]


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaMultiModalProcessor,
    info=PrunedLlavaProcessingInfo,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class PrunedLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """vLLM's LLaVA-1.5; a picture costs what its request's pruning ratio leaves of it.

    Where tokens are clustered, a picture's embeddings carry one more column, its cluster
    labels: so they go wherever vLLM keeps, sends or caches the embeddings, and arrive with
    them.

    Attributes:
        patch_choices: What Stage I made of each picture encoded since this was made a list;
            ``None`` keeps nothing.
    """

    patch_choices: list[PatchChoice | None] | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pruning = settings_of(self.config)
        self.selector = SELECTORS[self.pruning.selector]
        decoder = self.language_model.model
        self.staged_decoder = StagedDecoder(
            decoder, self.pruning.boundaries(len(decoder.layers)), vllm_config
        )
        self._encoder_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._labels: list[torch.Tensor] = []

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        counts = kwargs.pop(COUNTS_FIELD, None)
        if counts is None:
            return super().embed_multimodal(**kwargs)
        assert isinstance(counts, torch.Tensor)
        pictures = [VisualTokenCounts(v, k, (n1, n2, n3)) for v, k, n1, n2, n3 in counts.tolist()]
        if self.selector.encoder is None or not any(picture.is_pruned for picture in pictures):
            self._keep_choices([None] * len(pictures))
            return super().embed_multimodal(**kwargs)
        image_input = self._parse_and_validate_image_input(**kwargs)
        assert image_input is not None
        # vLLM budgets the encoder by the tokens it puts out; ours computes all patches. Never
        # more at once than a budget of unpruned pictures would let through.
        pixels = image_input["pixel_values"]
        most = max(1, self._encoder_tokens // pictures[0].encoder)
        return [
            embedding
            for i in range(0, len(pictures), most)
            for embedding in self._embed_pruned(pixels[i : i + most], pictures[i : i + most])
        ]

    def _embed_pruned(
        self, pixel_values: torch.Tensor, pictures: Sequence[VisualTokenCounts]
    ) -> list[torch.Tensor]:
        """Encode pictures together, and run Stage I on those of equal counts together.

        Returns:
            Per picture (n1, H), or (n1, H + 1) with cluster labels where it has clusters.
        """
        members = members_of(pictures)
        layer = self.vision_tower.vision_model.encoder.layers[-1]
        qkv = torch.empty(0)
        chosen: Chosen = {}

        def choose_early(output: torch.Tensor) -> torch.Tensor | None:
            nonlocal qkv, chosen
            qkv = output
            if self.selector.reads_embeddings:
                return None  # of all patches, when they are there
            chosen = self._choose(layer.self_attn, pixel_values, members, qkv)
            return rows_that_stay(members, chosen, qkv.device)

        with watching(layer, choose_early):
            features = self._image_pixels_to_features(self.vision_tower, pixel_values)
        if self.selector.reads_embeddings:
            chosen = self._choose(layer.self_attn, pixel_values, members, qkv, features)
        embeddings: list[torch.Tensor] = [torch.empty(0)] * len(pictures)
        choices: list[PatchChoice | None] = [None] * len(pictures)
        for counts, numbers in members.items():
            kept = chosen.get(counts)
            for number, embedding in zip(
                numbers, self._project(batch_of(features, numbers), kept), strict=True
            ):
                embeddings[number] = embedding
            if kept is not None and self.patch_choices is not None:
                for number, choice in zip(numbers, self._choices(kept), strict=True):
                    choices[number] = choice
        self._keep_choices(choices)
        return embeddings

    def _keep_choices(self, choices: Sequence[PatchChoice | None]) -> None:
        if self.patch_choices is not None:
            self.patch_choices += choices

    def _choose(
        self,
        attention: Any,
        pixels: torch.Tensor,
        members: Mapping[VisualTokenCounts, Sequence[int]],
        qkv: torch.Tensor,
        features: torch.Tensor | None = None,
    ) -> dict[VisualTokenCounts, ChosenPatches]:
        """Keep the patches that the selector chooses of each pruned picture, and cluster them.

        Args:
            attention: The tower's last attention layer.
            pixels: (B, 3, height, width) pictures.
            members: Numbers of the pictures by their counts.
            qkv: (B, 1 + V, 3 * local heads * D), of that layer, [CLS] first.
            features: (B, V, C) patches from the encoder, for selectors that read them.
        """
        query, key, _ = (x.unflatten(-1, (-1, attention.head_dim)) for x in qkv.chunk(3, dim=-1))
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        chosen = {}
        for counts, numbers in members.items():
            if not counts.is_pruned:
                continue
            view = EncoderView(
                cls_query=batch_of(query[:, 0], numbers),
                keys=batch_of(key, numbers),
                scale=attention.scale,
                grid=(side, side),
                pixels=batch_of(pixels, numbers),
                embed=partial(self._embed_whole, features, numbers),
                mean_over_ranks=partial(mean_over_ranks, ranks=attention.tp_size),
            )
            with SELECTION_SECONDS.labels(1).time():
                index = select_patches(self.selector, view, counts.stages[0])
                labels = self._labels_of(attention, view, index, counts.centres)
            chosen[counts] = ChosenPatches(view, index, labels)
        return chosen

    def _embed_whole(self, features: torch.Tensor | None, numbers: Sequence[int]) -> torch.Tensor:
        assert features is not None, "the selector reads embeddings before there are any"
        return self._project(batch_of(features, numbers), None)

    def _project(self, features: torch.Tensor, kept: ChosenPatches | None) -> torch.Tensor:
        """Embeddings of pictures with equal counts.

        Args:
            features: (B, V, C) patches from the encoder.
            kept: What stays of them; ``None`` where all does.

        Returns:
            (B, n1, H); with clusters (B, n1, H + 1), their labels' bits as one more column.
        """
        if kept is None:
            whole: torch.Tensor = self.multi_modal_projector(features)
            return whole
        embedded: torch.Tensor = self.multi_modal_projector(_take(features, kept.index))
        if kept.labels is None:
            return embedded
        return torch.cat((embedded, _label_column(kept.labels, embedded.dtype)), dim=-1)

    def _labels_of(
        self, attention: Any, view: EncoderView, index: torch.Tensor, num_centres: int
    ) -> torch.Tensor | None:
        """(B, n1) cluster labels of the patches that stay; ``None`` without centres."""
        if not num_centres:
            return None
        patch_keys = _take(view.keys[:, 1:].flatten(2), index)
        if attention.tp_size > 1:
            patch_keys = tensor_model_parallel_all_gather(patch_keys)
        return cluster_labels(
            patch_keys,
            patch_positions(index, *view.grid),
            num_centres,
            density_scale=self.pruning.density_scale,
            spatial_radius=self.pruning.spatial_radius,
        )

    def _choices(self, kept: ChosenPatches) -> list[PatchChoice]:
        view, saliency = kept.view, None
        if self.selector.encoder == "cls_attention":
            saliency = view.mean_over_ranks(cls_saliency(view.cls_query, view.keys, view.scale))
        return [
            PatchChoice(
                kept.index[i],
                None if kept.labels is None else kept.labels[i],
                None if saliency is None else saliency[i],
            )
            for i in range(kept.index.shape[0])
        ]

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Runs right before forward, with the pictures of the same step in order of rows.
        self._labels = []
        if multimodal_embeddings is not None:
            width = self.config.text_config.hidden_size
            self._labels = [
                _labels_of_column(embedding[:, width])
                for embedding in multimodal_embeddings
                if embedding.shape[1] > width
            ]
            multimodal_embeddings = [embedding[:, :width] for embedding in multimodal_embeddings]
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        step: StagedForward | None = None,
        **kwargs: object,
    ) -> Any:
        """vLLM's forward, or the staged one where ``step`` drops rows between stages."""
        if step is None:
            if inputs_embeds is not None and not self.staged_decoder.is_ready:
                with _without_graphs():
                    self.staged_decoder.compile(positions, inputs_embeds)
            return super().forward(
                input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
            )
        assert inputs_embeds is not None
        num_rows = step.outputs.shape[0]  # less what vLLM adds to reach the size of a graph
        with _without_graphs():
            return self.staged_decoder(
                self.selector,
                step,
                positions[:num_rows],
                inputs_embeds[:num_rows],
                self._labels,
            )

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """vLLM's question in model runner V2: which class adapts it to this model."""
        # Other model runners need nothing of V2's.
        from vitcop_vllm.worker.v2 import StagedModelState

        return StagedModelState


def _without_graphs() -> AbstractContextManager[None]:
    """A forward context in which nothing is captured or replayed, whatever vLLM has chosen."""
    eager = replace(
        get_forward_context(), cudagraph_runtime_mode=CUDAGraphMode.NONE, batch_descriptor=None
    )
    context: AbstractContextManager[None] = override_forward_context(eager)
    return context


def _take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, V, C) rows at (B, n) indices: (B, n, C)."""
    # Not gather: on a CPU, looking up whole rows is many times faster than each number.
    return rows[torch.arange(index.shape[0], device=index.device)[:, None], index]


_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _label_column(labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, n) labels as a (B, n, 1) column of ``dtype``: the bits, for values would round."""
    return labels.to(_BITS[dtype]).view(dtype).unsqueeze(-1)


def _labels_of_column(column: torch.Tensor) -> torch.Tensor:
    """The (n,) int64 labels a column was made of."""
    return column.contiguous().view(_BITS[column.dtype]).to(torch.int64)
