"""A selector: one way to select the visual tokens that survive. ``selectors`` holds them.

Without torch: scheduler and server read budgets and flags, and never call the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vitcop_vllm.pruning.budgets import BudgetRule

if TYPE_CHECKING:
    from torch import Tensor

    from vitcop_vllm.pruning.selection import StageTwoSelection
    from vitcop_vllm.pruning.views import BoundaryView, EncoderView

    EncoderFunction = Callable[[EncoderView, int], Tensor]
    BoundaryFunction = Callable[[BoundaryView, int], Tensor | StageTwoSelection]

SaliencySource = Literal["cls", "received"]
"""``cls``: the attention from [CLS] to a token. ``received``: the attention from all tokens."""


@dataclass(frozen=True)
class Selector:
    """How many visual tokens live where, and functions that select them.

    A function takes a view of B images (or G spans) and a count. It returns exactly ``count``
    indices of each, (B, count) int64, ascending, whatever the values are; ties go to the lower
    index.

    Attributes:
        budget: Computes K, n1, n2 and n3.
        saliency: Stage I keeps the n1 tokens of highest saliency, from the first of these sources
            that the encoder has. Empty: see ``encoder``.
        encoder: Selects n1 of V tokens in the encoder, where ``saliency`` is empty; ``None``
            keeps all.
        shallow: Selects n2 of n1 tokens at the shallow boundary; ``None`` keeps all.
        deep: Selects n3 of n2 tokens at the deep boundary; ``None`` keeps all.
        clusters: Whether ``shallow`` needs the cluster labels of Stage I.
        ranks_by_signal: Whether ``shallow`` and ``deep`` rank tokens by the setting
            ``decoder_signal``; see ``signals``.
        reads_question: Whether a selection depends on tokens after the image. Such a selection
            is valid for one prompt only: no prefix is cached, and a step computes a whole prompt.
        reads_embeddings: Whether ``encoder`` reads the tokens as the decoder gets them, and so
            runs after the encoder.
        reads_layer: Whether an ``encoder`` that reads embeddings reads the encoder's last layer
            too, such as the attention of [CLS].
        reads_hidden: Boundaries, 1 for shallow and 2 for deep, whose function reads or changes
            the residual stream. At other boundaries tokens are dropped before the MLP of the
            layer before, because its keys are known by then.
    """

    budget: BudgetRule
    saliency: tuple[SaliencySource, ...] = ()
    encoder: EncoderFunction | None = None
    shallow: BoundaryFunction | None = None
    deep: BoundaryFunction | None = None
    clusters: bool = False
    ranks_by_signal: bool = False
    reads_question: bool = False
    reads_embeddings: bool = False
    reads_layer: bool = False
    reads_hidden: tuple[int, ...] = ()

    @property
    def prunes_encoder(self) -> bool:
        """Whether Stage I drops tokens."""
        return bool(self.saliency) or self.encoder is not None

    @property
    def stages(self) -> tuple[str, ...]:
        """The Stages that drop tokens."""
        drops = (self.prunes_encoder, self.shallow is not None, self.deep is not None)
        return tuple(name for name, does in zip(("I", "II", "III"), drops, strict=True) if does)

    @property
    def prunes_decoder(self) -> bool:
        """Whether Stage II or III drops tokens."""
        return self.shallow is not None or self.deep is not None

    @property
    def needs_cls(self) -> bool:
        """Whether the selector cannot work with an encoder that has no [CLS]."""
        return self.saliency == ("cls",)

    @property
    def has_two_sources(self) -> bool:
        """Whether ``encoder_signal`` chooses what Stage I ranks tokens by."""
        return len(self.saliency) > 1

    def select_in_encoder(self, view: EncoderView, count: int) -> tuple[Tensor, Tensor | None]:
        """Stage I: the tokens that are kept, (B, count), and the (B, V) saliency they rank by.

        The saliency is float32, higher is more salient; ``None`` if the selector ranks by none.
        """
        source = self.saliency_source(has_cls=view.offers_cls)
        if source is not None:
            saliency = view.saliency(source)
            return view.most_salient(saliency, count), saliency
        assert self.encoder is not None, "the selector keeps all tokens in the encoder"
        return self.encoder(view, count), None

    def select_at(
        self, boundary: int, view: BoundaryView, count: int
    ) -> Tensor | StageTwoSelection:
        """The tokens that cross ``boundary``, (G, count); merged tokens with their groups."""
        select = self._function_at(boundary)
        assert select is not None, f"the selector drops no token at boundary {boundary}"
        return select(view, count)

    def _function_at(self, boundary: int) -> BoundaryFunction | None:
        return (self.shallow, self.deep)[boundary - 1]

    def drops_before_mlp(self, boundary: int) -> bool:
        """Whether tokens dropped at ``boundary`` skip the MLP of the layer before it."""
        return self._function_at(boundary) is not None and boundary not in self.reads_hidden

    def saliency_source(self, *, has_cls: bool) -> SaliencySource | None:
        """What Stage I ranks tokens by; ``None`` if it ranks none.

        Args:
            has_cls: Whether the encoder has [CLS].
        """
        sources = (source for source in self.saliency if has_cls or source != "cls")
        return next(sources, None)

    def max_ratio(self, boundaries: tuple[int, int], num_layers: int) -> float:
        """Largest reachable ratio: tokens that Stage I keeps live through the first S layers."""
        return 1.0 if self.prunes_encoder else 1.0 - boundaries[0] / num_layers


def indices_of(taken: Tensor, count: int) -> Tensor:
    """(B, count) int64, ascending: where (B, n) ``taken`` is set, ``count`` times per row.

    If it is set less often, which values that are not finite can cause, the lowest indices
    among the others fill up.
    """
    # A stable sort stands in for nonzero, whose shape depends on data.
    first = taken.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    return first.sort(dim=1).values
