"""LLaVA-1.5 with visual tokens dropped in three stages."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vitcop_vllm.engine.config import settings_of
from vitcop_vllm.engine.metrics import SELECTION_SECONDS
from vitcop_vllm.models.dummy_runs import dummy_counts, dummy_step
from vitcop_vllm.models.llava_processor import (
    COUNTS_FIELD,
    PrunedLlavaMultiModalProcessor,
    PrunedLlavaProcessingInfo,
)
from vitcop_vllm.models.patch_choice import (
    Chosen,
    ChosenPatches,
    RowsThatStay,
    batch_of,
    members_of,
    rows_that_stay,
    take,
    watching,
)
from vitcop_vllm.models.staged_decoder import StagedDecoder, stage_layers
from vitcop_vllm.models.tensor_parallel import concat_over_ranks, mean_over_ranks
from vitcop_vllm.pruning.budgets import SELECTORS
from vitcop_vllm.pruning.kernel_set import kernel_set
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.saliency import cls_saliency, patch_positions
from vitcop_vllm.pruning.selectors import EncoderView, select_patches
from vitcop_vllm.worker.explain import PatchChoice
from vitcop_vllm.worker.step import StagedForward


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
        self.kernels = kernel_set(self.pruning.kernels)
        decoder = self.language_model.model
        boundaries = self.pruning.boundaries(len(decoder.layers))
        stage_layers(decoder.layers, boundaries, vllm_config)
        self.staged_decoder = StagedDecoder(
            decoder, boundaries, self.selector, self.kernels, vllm_config
        )
        self._encoder_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._labels: list[torch.Tensor] = []
        # Parts that ran on dummy data while vLLM measured memory, or on real data since.
        self._encoder_ran = self._stages_ran = False

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        counts = kwargs.pop(COUNTS_FIELD, None)
        if counts is None:  # embeddings that a client has computed: of unpruned pictures
            embeddings = super().embed_multimodal(**kwargs)
            self._keep_choices([None] * len(embeddings))
            return embeddings
        assert isinstance(counts, torch.Tensor)
        pictures = [VisualTokenCounts(v, k, (n1, n2, n3)) for v, k, n1, n2, n3 in counts.tolist()]
        if self.selector.encoder is None or not any(picture.is_pruned for picture in pictures):
            if not self._encoder_ran:
                self._profile_encoder(len(pictures), **kwargs)
            self._keep_choices([None] * len(pictures))
            return super().embed_multimodal(**kwargs)
        image_input = self._parse_and_validate_image_input(**kwargs)
        assert image_input is not None
        self._encoder_ran = True
        # vLLM budgets the encoder by the tokens it puts out; ours computes all patches. Never
        # more at once than a budget of unpruned pictures would let through.
        pixels = image_input["pixel_values"]
        most = max(1, self._encoder_tokens // pictures[0].encoder)
        return [
            embedding
            for i in range(0, len(pictures), most)
            for embedding in self._embed_pruned(pixels[i : i + most], pictures[i : i + most])
        ]

    def _profile_encoder(self, num_images: int, **kwargs: object) -> None:
        """Encode pruned images too while vLLM measures memory with unpruned dummy images."""
        self._encoder_ran = True
        if counts := self._dummy_counts():
            row = [counts.encoder, counts.centres, *counts.stages]
            self.embed_multimodal(**kwargs, **{COUNTS_FIELD: torch.tensor([row] * num_images)})

    def _dummy_counts(self) -> VisualTokenCounts | None:
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return dummy_counts(self.pruning, self.config.text_config.num_hidden_layers, side * side)

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

        def choose_early(output: torch.Tensor) -> RowsThatStay | None:
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
        with SELECTION_SECONDS.labels(1).time():
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
                    kernels=self.kernels,
                )
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
        embedded: torch.Tensor = self.multi_modal_projector(take(features, kept.index))
        if kept.labels is None:
            return embedded
        return torch.cat((embedded, _label_column(kept.labels, embedded.dtype)), dim=-1)

    def _labels_of(
        self, attention: Any, view: EncoderView, index: torch.Tensor, num_centres: int
    ) -> torch.Tensor | None:
        """(B, n1) cluster labels of the patches that stay; ``None`` without centres."""
        if not num_centres:
            return None
        patch_keys = take(view.keys[:, 1:].flatten(2), index)
        return self.kernels.cluster_labels(
            concat_over_ranks(patch_keys, attention.tp_size),
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
            if inputs_embeds is not None and not self._stages_ran:
                self._profile_stages(positions, inputs_embeds)
            return super().forward(
                input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
            )
        assert inputs_embeds is not None
        self._stages_ran = True
        num_rows = step.outputs.shape[0]  # less what vLLM adds to reach the size of a graph
        with _without_graphs():
            return self.staged_decoder(
                step,
                positions[:num_rows],
                inputs_embeds[:num_rows],
                self._labels,
            )

    def _profile_stages(self, positions: torch.Tensor, inputs_embeds: torch.Tensor) -> None:
        """Compile the stages and run them in vLLM's first run on dummy rows.

        That run has as many rows as a step can have, and vLLM measures memory in it.

        Args:
            positions: (T,) rotary positions.
            inputs_embeds: (T, H) embeddings.
        """
        if get_forward_context().attn_metadata is not None:
            return  # a real step
        self._stages_ran = True
        if (counts := self._dummy_counts()) is None:
            return
        dummy = dummy_step(counts, inputs_embeds.shape[0], inputs_embeds.device)
        if dummy is None:
            return
        step, self._labels = dummy
        # Copies: compiled code remembers that it was first called with parts of one tensor.
        num_rows = step.outputs.shape[0]
        positions, inputs_embeds = positions[:num_rows].clone(), inputs_embeds[:num_rows].clone()
        self.forward(None, positions, inputs_embeds=inputs_embeds, step=step)

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


_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _label_column(labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, n) labels as a (B, n, 1) column of ``dtype``: the bits, for values would round."""
    return labels.to(_BITS[dtype]).view(dtype).unsqueeze(-1)


def _labels_of_column(column: torch.Tensor) -> torch.Tensor:
    """The (n,) int64 labels a column was made of."""
    return column.contiguous().view(_BITS[column.dtype]).to(torch.int64)
