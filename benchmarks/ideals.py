"""Ideal savings of pruning, computed from the plan.

The encoder computes every patch; the cost of a decoder layer is assumed proportional to its tokens.
Attention grows faster, so long prompts may beat their ideal; kernels that are slow for few rows
miss it.
"""

from dataclasses import dataclass
from math import ceil
from typing import Self

from benchmarks.shapes import Shape, boundaries
from vitcop_vllm.pruning.plan import VisualTokenCounts, plan_counts
from vitcop_vllm.pruning.settings import PruningSettings, SelectorName

UNPRUNED_FIT = 8
"""Unpruned requests that fit in the KV memory of scenario capacity."""

KV_BLOCK = 128
"""Tokens of stock vLLM's block on a CPU, a multiple of all other block sizes."""


@dataclass(frozen=True)
class ImagePlan:
    """An image's visual tokens per layer, under the bench's settings.

    Attributes:
        counts: Visual tokens of each stage.
        layers: Decoder layers of each stage.
    """

    counts: VisualTokenCounts
    layers: tuple[int, int, int]

    @classmethod
    def of(cls, shape: Shape, ratio: float, selector: SelectorName) -> Self:
        settings = PruningSettings(selector=selector, **boundaries(shape))
        counts = plan_counts(settings, ratio, shape.layers, shape.visual_tokens)
        shallow, deep = settings.boundaries(shape.layers)
        return cls(counts, (shallow, deep - shallow, shape.layers - deep))

    @property
    def average(self) -> float:
        """Visual tokens, averaged over the decoder's layers."""
        shallow, middle, _ = self.layers
        return self.counts.layer_average((shallow, shallow + middle), sum(self.layers))

    def share(self, text: int, images: int = 1) -> float:
        """Kept share of a prompt with ``text`` text tokens, averaged over layers."""
        return (text + images * self.average) / (text + images * self.counts.encoder)


def ideal_prefill(stock: float, encoder: float, share: float) -> float:
    """Seconds of a prefill whose decoder computes ``share`` of its tokens.

    Args:
        stock: Seconds of the prefill in stock vLLM, encoder included.
        encoder: Seconds of the encoder in stock vLLM.
        share: See :meth:`ImagePlan.share`.
    """
    return encoder + max(0.0, stock - encoder) * share


def ideal_capacity(budget: int, longest: float, num_layers: int) -> float:
    """Number of requests that fit, without rounding to blocks or to whole requests.

    Args:
        budget: KV slots times layers.
        longest: Tokens of a finished request, averaged over layers.
        num_layers: L, decoder layers.
    """
    return budget / (longest * num_layers)


def kv_budget(unpruned: int, num_layers: int) -> int:
    """KV slots times layers that hold ``UNPRUNED_FIT`` requests of ``unpruned`` tokens each."""
    return UNPRUNED_FIT * ceil(unpruned / KV_BLOCK) * KV_BLOCK * num_layers
