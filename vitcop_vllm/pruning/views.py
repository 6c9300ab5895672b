"""What a selector sees: the encoder's last layer, or a boundary between two runs of decoder layers.

B images (or G spans) have equal token counts. Arithmetic is float32. Nothing here waits for the
device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from vitcop_vllm.pruning.kernel_set import KernelSet
from vitcop_vllm.pruning.saliency import attention_received, cls_saliency
from vitcop_vllm.pruning.selection import mean_key_norm
from vitcop_vllm.pruning.selector import SaliencySource


@dataclass(frozen=True)
class EncoderView:
    """The last encoder layer on B images of one grid; V visual tokens, D head size.

    A visual token is made of P patches, which are neighbours among the keys. ``heads`` are
    this rank's.

    Attributes:
        queries: Makes (B, Q, heads, D), the queries that attention received is averaged over.
        keys: (B, C + V * P, heads, D) keys, after rotary embedding; C is 1 with [CLS], else 0.
        cls_query: (B, heads, D) query of [CLS]; ``None`` in encoders without it.
        features: Makes (B, V, heads * D), what tokens are clustered by: their keys before
            rotary embedding, averaged over patches.
        scale: Factor on the scores of query and key.
        grid: Rows and columns of visual tokens; row-major, V in all.
        pixels: (B, ...) the images as they enter the encoder.
        embed: Makes (B, V, H), the tokens as the decoder would get them.
        mean_over_ranks: Averages a tensor over tensor-parallel ranks.
        concat_over_ranks: Joins the last dimensions of a tensor that all ranks have.
        kernels: Implementation of the functions that choose tokens.
    """

    queries: Callable[[], Tensor]
    keys: Tensor
    cls_query: Tensor | None
    features: Callable[[], Tensor]
    scale: float
    grid: tuple[int, int]
    pixels: Tensor
    embed: Callable[[], Tensor]
    mean_over_ranks: Callable[[Tensor], Tensor]
    concat_over_ranks: Callable[[Tensor], Tensor]
    kernels: KernelSet

    @classmethod
    def of_embeddings(cls, embeddings: Tensor, grid: tuple[int, int], kernels: KernelSet) -> Self:
        """A view for selectors that read (B, V, H) embeddings, and nothing of the layer."""
        nothing = embeddings.new_empty(0)
        return cls(
            queries=lambda: nothing,
            keys=nothing,
            cls_query=None,
            features=lambda: nothing,
            scale=1.0,
            grid=grid,
            pixels=nothing,
            embed=lambda: embeddings,
            mean_over_ranks=lambda x: x,
            concat_over_ranks=lambda x: x,
            kernels=kernels,
        )

    def saliency(self, source: SaliencySource) -> Tensor:
        """(B, V) float32 saliency of each visual token; higher is more salient."""
        return self._attention_of_cls() if source == "cls" else self._attention_received()

    def _attention_of_cls(self) -> Tensor:
        """Attention from [CLS], summed over heads."""
        assert self.cls_query is not None, "this encoder has no [CLS]"
        return self.mean_over_ranks(cls_saliency(self.cls_query, self.keys, self.scale))

    def _attention_received(self) -> Tensor:
        """Attention from all tokens, averaged over a visual token's patches."""
        received = attention_received(self.queries(), self.keys, self.scale)
        per_patch = received[:, self.cls_query is not None :]
        num_tokens = self.grid[0] * self.grid[1]
        return self.mean_over_ranks(per_patch.unflatten(1, (num_tokens, -1)).mean(dim=2))


@dataclass(frozen=True)
class BoundaryView:
    """What there is to see at a boundary: G spans of n tokens in a step of T rows.

    Attributes:
        rows: (G, n) int64, the spans' rows.
        queries: (T, heads, D) queries of the layer before, after rotary embedding; the heads
            are this rank's.
        keys: (T, kv_heads, D) keys of that layer, likewise.
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
    """

    rows: Tensor
    queries: Tensor
    keys: Tensor
    scale: float
    hidden: Callable[[], Tensor]
    norm_weight: Tensor
    prompt_rows: Tensor | None
    labels: Tensor | None
    num_centres: int
    mean_over_ranks: Callable[[Tensor], Tensor]
    kernels: KernelSet

    def key_norms(self) -> Tensor:
        """(G, n) float32 L2 norms of the keys, averaged over the KV heads of all ranks first."""
        return mean_key_norm(self.keys[self.rows], self.mean_over_ranks)
