"""What pruning should save, counted from the plan: pure arithmetic.

The encoder computes every patch whatever survives; a decoder layer is taken to cost its
tokens. Attention, whose cost grows faster, should do better than that, and kernels that are
slow for few rows do worse. A decode step costs what it costs stock vLLM with as many tokens in
its KV cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Self

from benchmarks.asks import Ask
from benchmarks.engines import OURS
from benchmarks.shapes import Shape, boundaries
from vitcop_vllm.pruning.plan import VisualTokenCounts, plan_counts
from vitcop_vllm.pruning.settings import PruningSettings, SelectorName

UNPRUNED_FIT = 8
"""Unpruned requests for which stock vLLM has blocks where KV memory is the limit; at 8/9 there
is memory for some 40."""

KV_BLOCK = 128
"""Tokens: stock vLLM's block on a CPU, and a multiple of all others."""


@dataclass(frozen=True)
class ImagePlan:
    """An image's visual tokens, layer by layer, under the settings a bench serves with.

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
        """Tokens left of a prompt with ``text`` tokens of text, averaged over layers, in (0, 1]."""
        return (text + images * self.average) / (text + images * self.counts.encoder)


def ideal_prefill(stock: float, encoder: float, share: float) -> float:
    """Seconds of a prefill whose decoder computes ``share`` of its tokens.

    Args:
        stock: Seconds it takes stock vLLM, the encoder among them.
        encoder: Seconds the encoder takes stock vLLM.
        share: See :meth:`ImagePlan.share`.
    """
    return encoder + max(0.0, stock - encoder) * share


def ideal_capacity(budget: int, longest: float, num_layers: int) -> float:
    """Requests whose KV fits, were there no blocks and no whole requests.

    Args:
        budget: KV slots times layers.
        longest: Tokens of a request at its longest, averaged over layers.
        num_layers: L, decoder layers.
    """
    return budget / (longest * num_layers)


def kv_budget(unpruned: int, num_layers: int) -> int:
    """KV slots times layers that hold ``UNPRUNED_FIT`` requests of ``unpruned`` tokens each."""
    return UNPRUNED_FIT * ceil(unpruned / KV_BLOCK) * KV_BLOCK * num_layers


@dataclass(frozen=True)
class StockCosts:
    """What serving costs stock vLLM. Only ratios of these are used: the machine may drift.

    Attributes:
        encoder: Seconds of an image.
        token: Seconds of a prompt's token, in all decoder layers.
        step, text_step: Seconds of a decode step after prompts with an image each, and without.
    """

    encoder: float
    token: float
    step: float
    text_step: float

    def ideal_serving(
        self,
        shape: Shape,
        asks: Sequence[Ask],
        prompt_tokens: Sequence[int],
        seconds: float,
        decode_seconds: float,
    ) -> float:
        """Seconds of an engine that spends on requests what their plans keep, and no more.

        Args:
            shape: The model's.
            asks: About an image each.
            prompt_tokens: Of each, unpruned.
            seconds: What stock vLLM takes for them.
            decode_seconds: Of these, in steps that do nothing but decode.
        """
        averages = {
            ratio: ImagePlan.of(shape, ratio, OURS).average for ratio in {ask.ratio for ask in asks}
        }
        dropped = [shape.visual_tokens - averages[ask.ratio] for ask in asks]
        encoder, decoder = len(asks) * self.encoder, sum(prompt_tokens) * self.token
        prefill = seconds - decode_seconds
        ideal = ideal_prefill(
            prefill,
            prefill * encoder / (encoder + decoder),
            1 - sum(dropped) / sum(prompt_tokens),
        )
        steps = [ask.max_tokens - 1 for ask in asks]
        gone = sum(tokens * n for tokens, n in zip(dropped, steps, strict=True))
        gone /= shape.visual_tokens * max(1, sum(steps))
        # An image may cost less than steps differ anyway.
        step_share = 1 - gone * max(0.0, 1 - self.text_step / self.step)
        return ideal + decode_seconds * step_share
