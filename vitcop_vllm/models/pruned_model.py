"""What every pruned model does in the decoder, if all three Stages prune it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from vitcop_vllm.models.dummy_runs import dummy_counts, dummy_step
from vitcop_vllm.models.pruned_encoder import PrunedEncoder
from vitcop_vllm.models.staged_decoder import StagedDecoder, replace_attention
from vitcop_vllm.pruning.signals import DEFAULT_SIGNAL, SIGNALS
from vitcop_vllm.worker.explain import SelectionSink
from vitcop_vllm.worker.step import StagedForward


class PrunedModel(PrunedEncoder):
    """An image costs what its request's pruning ratio leaves of it. A mixin of vLLM's model.

    The model has ``language_model.model``, a decoder of layers as vLLM's Llama has them.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        this: Any = self
        decoder = this.language_model.model
        boundaries = self.pruning.boundaries(len(decoder.layers))
        replace_attention(decoder.layers, boundaries, vllm_config)
        self.staged_decoder = StagedDecoder(
            decoder,
            boundaries,
            self.selector,
            self.kernels,
            SIGNALS[self.pruning.decoder_signal or DEFAULT_SIGNAL],
            vllm_config,
            self.num_deepstack_levels,
        )
        # Whether the segments ran, on dummy data while vLLM measured memory or on real data since.
        self._segments_ran = False

    def take_deepstack(self, num_rows: int) -> AbstractContextManager[IntermediateTensors | None]:
        """The step's deepstack features, (T, H) per level; the model forgets them afterwards."""
        return nullcontext()

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        step: StagedForward | None = None,
        sink: SelectionSink | None = None,
        **kwargs: object,
    ) -> Any:
        """vLLM's forward, or the staged one where ``step`` drops rows between segments.

        ``sink`` records what the staged one selects.
        """
        if step is None:
            if inputs_embeds is not None and not self._segments_ran:
                self._profile_segments(positions, inputs_embeds)
            return super().forward(
                input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
            )
        assert inputs_embeds is not None
        self.add_places(positions)
        if self.columns.labels:
            self._check_labels(step)
        self._segments_ran = True
        num_rows = step.outputs.shape[0]  # less what vLLM adds to reach the size of a graph
        with _without_graphs(), self.take_deepstack(num_rows) as deepstack:
            return self.staged_decoder(
                step,
                positions[..., :num_rows],
                inputs_embeds[:num_rows],
                self._labels,
                sink,
                deepstack,
            )

    def _check_labels(self, step: StagedForward) -> None:
        """Stage I clusters every pruned image, also one that loses nothing in later segments.

        A video may have a token that belongs to no frame, and that nobody reads a label of.
        """
        lengths = [span.num_tokens for span in step.images]
        assert sum(lengths) <= self._num_labels, (
            f"the step has {len(lengths)} pruned images of {sum(lengths)} tokens, and the "
            f"embeddings carry cluster labels of {self._num_labels}"
        )

    def _profile_segments(self, positions: torch.Tensor, inputs_embeds: torch.Tensor) -> None:
        """Compile the segments and run them in vLLM's first run on dummy rows.

        That run has as many rows as a step can have, and vLLM measures memory in it.

        Args:
            positions: (T,) rotary positions, or (3, T).
            inputs_embeds: (T, H) embeddings.
        """
        if get_forward_context().attn_metadata is not None:
            return  # a real step
        self._segments_ran = True
        most_rows = inputs_embeds.shape[0]
        info: Any = MULTIMODAL_REGISTRY.get_processing_info(self._model_config)
        encoder_tokens = min(info.get_max_image_tokens(), most_rows)
        counts = dummy_counts(self.pruning, self._num_layers, encoder_tokens)
        if counts is None:
            return
        dummy = dummy_step(
            counts,
            most_rows,
            inputs_embeds.device,
            find_prompts=self.selector.reads_question,
        )
        if dummy is None:
            return
        step, self._labels = dummy
        self._num_labels = most_rows
        # Copies: compiled code remembers that it was first called with parts of one tensor.
        num_rows = step.outputs.shape[0]
        positions = positions[..., :num_rows].clone()
        self.forward(None, positions, inputs_embeds=inputs_embeds[:num_rows].clone(), step=step)

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
