"""What a selector sees: the encoder's last layer, or a boundary between two runs of decoder layers.

B images (or G spans) have equal token counts. Arithmetic is float32. Nothing here waits for the
device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from vitcop_vllm.pruning.frames import changed_first
from vitcop_vllm.pruning.grids import Grids, count_tokens
from vitcop_vllm.pruning.kernel_set import KernelSet
from vitcop_vllm.pruning.saliency import attention_received, cls_saliency
from vitcop_vllm.pruning.selection import mean_key_norm
from vitcop_vllm.pruning.selector import SaliencySource
from vitcop_vllm.pruning.signals import SIGNALS, Signal


@dataclass(frozen=True)
class EncoderView:
    """The last encoder layer on B images of equal grids; V visual tokens, D head size.

    The encoder computes S sequences of T rows: one per image, or one per tile of each image.
    ``heads`` are this rank's.

    Attributes:
        queries: Makes (S, Q, heads, D), the queries that attention received is averaged over.
        keys: (S, T, heads, D) keys, after rotary embedding; [CLS] first, if the encoder has it.
        cls_query: (S, heads, D) query of [CLS]; ``None`` in encoders without it.
        to_tokens: Turns (S, T without [CLS]) float32, a number for each patch, into (B, V), a
            number for each visual token, by what the model does to patches: averages, tiles put
            together. The number of a row mark is 0.
        features: Makes (B, V, heads * D), what tokens are clustered by: their keys before
            rotary embedding, averaged over patches.
        scale: Factor on the scores of query and key.
        grids: Grids of each image's visual tokens, V in all.
        pixels: (B, ...) the images as they enter the encoder.
        embed: Makes (B, V, H), the tokens as the decoder would get them.
        mean_over_ranks: Averages a tensor over tensor-parallel ranks.
        concat_over_ranks: Joins the last dimensions of a tensor that all ranks have.
        kernels: Implementation of the functions that choose tokens.
        prompt_order: (V,) int64, number of each token in the prompt; ``None`` if the prompt has the
            tokens in the order of the grids.
        reads_cls: Whether the attention of [CLS] may be read, if the encoder has [CLS].
        changed: (B, V) bool, tokens of frames that show something else than the frame before;
            ``None`` if the images are no frames, or if frames are not compared.
    """

    queries: Callable[[], Tensor]
    keys: Tensor
    cls_query: Tensor | None
    to_tokens: Callable[[Tensor], Tensor]
    features: Callable[[], Tensor]
    scale: float
    grids: Grids
    pixels: Tensor
    embed: Callable[[], Tensor]
    mean_over_ranks: Callable[[Tensor], Tensor]
    concat_over_ranks: Callable[[Tensor], Tensor]
    kernels: KernelSet
    prompt_order: Tensor | None = None
    reads_cls: bool = True
    changed: Tensor | None = None

    @classmethod
    def of_embeddings(
        cls,
        embeddings: Tensor,
        grids: Grids,
        kernels: KernelSet,
        prompt_order: Tensor | None = None,
    ) -> Self:
        """A view for selectors that read (B, V, H) embeddings, and nothing of the layer."""
        nothing = embeddings.new_empty(0)
        return cls(
            queries=lambda: nothing,
            keys=nothing,
            cls_query=None,
            to_tokens=lambda x: x,
            features=lambda: nothing,
            scale=1.0,
            grids=grids,
            pixels=nothing,
            embed=lambda: embeddings,
            mean_over_ranks=lambda x: x,
            concat_over_ranks=lambda x: x,
            kernels=kernels,
            prompt_order=prompt_order,
        )

    @property
    def num_tokens(self) -> int:
        """V, number of an image's visual tokens."""
        return count_tokens(self.grids)

    @property
    def offers_cls(self) -> bool:
        """Whether Stage I may rank tokens by the attention of [CLS]."""
        return self.reads_cls and self.cls_query is not None

    def saliency(self, source: SaliencySource) -> Tensor:
        """(B, V) float32 saliency of each visual token; higher is more salient."""
        per_patch = self._attention_of_cls() if source == "cls" else self._attention_received()
        return self.mean_over_ranks(self.to_tokens(per_patch))

    def most_salient(self, saliency: Tensor, count: int) -> Tensor:
        """(B, count) int64, ascending: the most salient tokens, changed ones first."""
        if self.changed is not None:
            return changed_first(saliency, self.changed, count)
        return self.kernels.most_salient(saliency, count)

    def _attention_of_cls(self) -> Tensor:
        """(S, T - 1) attention from [CLS] to each patch, summed over heads."""
        assert self.cls_query is not None, "this encoder has no [CLS]"
        return cls_saliency(self.cls_query, self.keys, self.scale)

    def _attention_received(self) -> Tensor:
        """(S, T without [CLS]) attention from all tokens to each patch."""
        received = attention_received(self.queries(), self.keys, self.scale)
        return received[:, self.cls_query is not None :]


@dataclass(frozen=True)
class BoundaryView:
    """What there is to see at a boundary: G spans of n tokens in a step of T rows.

    Attributes:
        rows: (G, n) int64, the spans' rows.
        queries: (T, heads, D) queries of the layer before, after rotary embedding; the heads
            are this rank's.
        keys: (T, kv_heads, D) keys of that layer, likewise.
        values: (T, kv_heads, D) values of that layer.
        raw_keys: Makes (G, n, kv_heads, D), the spans' keys as projected, before the key norm and
            rotary embedding; only if the signal reads them.
        scale: Factor on the scores of query and key.
        hidden: Makes (G, n, H), the spans' residual stream after the layer before. It lacks
            that layer's MLP unless the selector says that it reads the stream.
        norm_weight: (H,), of the norm that ends the decoder.
        prompt_rows: (2, G) int64, first and last row of each span's prompt; ``None`` unless the
            selector reads the question.
        labels: (G, n) int64 cluster labels; ``None`` where there are no clusters.
        num_centres: K.
        mean_over_ranks: Averages a tensor over tensor-parallel ranks.
        kernels: Implementation of the functions that choose tokens.
        signal: What tokens are ranked by, if the selector ranks them by a signal.
    """

    rows: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    raw_keys: Callable[[], Tensor]
    scale: float
    hidden: Callable[[], Tensor]
    norm_weight: Tensor
    prompt_rows: Tensor | None
    labels: Tensor | None
    num_centres: int
    mean_over_ranks: Callable[[Tensor], Tensor]
    kernels: KernelSet
    signal: Signal

    def scores(self) -> Tensor:
        """(G, n) float32 scores of the tokens, not negative; a smaller score is more salient."""
        return self.signal.score(self)

    def image_attention(self) -> Tensor:
        """(G, n) float32 scores by attention from the image's end, whatever the signal."""
        return SIGNALS["image_attention"].score(self)

    def mean_norm(self, keys: Tensor) -> Tensor:
        """(G, n) float32 L2 norms of (G, n, kv_heads, D) keys, averaged over all heads first."""
        return mean_key_norm(keys, self.mean_over_ranks)
