"""How much of its images a request drops: a ratio, a budget of tokens, or ``auto``.

Each becomes a ratio per image before anything is computed. So counts stay known to all processes,
and two ways to ask for the same counts share all caches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Protocol

from vitcop_vllm.pruning.settings import AUTO, RATIO_HEADER, RATIO_KEY, PruningSettings, quote

BUDGET_KEY = "pruning_budget"
"""Name of a request's budget, in the request body and in the processor keywords."""

BUDGET_HEADER = "X-Pruning-Budget"
"""Request header that sets the budget, and response header that repeats it."""

BOUNDS_KEY = "pruning_bounds"
"""Processor keyword: least and largest ratio of this request, in place of the operator's, unless it
names a ratio."""

AMOUNT_KEYS = (RATIO_KEY, BUDGET_KEY, BOUNDS_KEY)
"""Processor keywords of an amount."""

FINE_SHARE = 0.003
"""Share of dense patches from which ``auto`` treats an image as fine: 2 of 576."""


def ratio_text(ratio: float) -> str:
    """The shortest decimal that reads back as ``ratio``, never with an exponent."""
    return format(Decimal(repr(ratio)), "f")


class Amount(Protocol):
    """How much of its images a request drops. Its text is the value of its header."""

    @property
    def header(self) -> str:
        """Name of the header that asks for it."""

    @property
    def needs_detail(self) -> bool:
        """Whether :meth:`ratio` reads the share of dense patches."""

    def ratio(self, num_tokens: int, dense_share: float | None) -> float:
        """Pruning ratio of one image, or of a video's frames, in [0, 1).

        Args:
            num_tokens: V, visual tokens of the image or frame without pruning.
            dense_share: See :mod:`detail`; may be ``None`` unless ``needs_detail``.
        """

    def processor_kwargs(self) -> dict[str, object]:
        """The processor keywords that say this; see :func:`amount_of`."""


@dataclass(frozen=True)
class FixedRatio:
    """The same ratio for all images."""

    value: float
    header = RATIO_HEADER
    needs_detail = False

    def __str__(self) -> str:
        return ratio_text(self.value)

    def ratio(self, num_tokens: int, dense_share: float | None) -> float:
        return self.value

    def processor_kwargs(self) -> dict[str, object]:
        return {RATIO_KEY: self.value}


@dataclass(frozen=True)
class TokenBudget:
    """As many visual tokens of each image, averaged over the decoder's layers.

    Attributes:
        tokens: The budget. An image with fewer tokens is not pruned.
        most: Largest ratio. An image so large that it would need more keeps more tokens.
    """

    tokens: int
    most: float
    header = BUDGET_HEADER
    needs_detail = False

    def __str__(self) -> str:
        return str(self.tokens)

    def ratio(self, num_tokens: int, dense_share: float | None) -> float:
        return min(max(0.0, 1.0 - self.tokens / num_tokens), self.most)

    def processor_kwargs(self) -> dict[str, object]:
        return {BUDGET_KEY: self.tokens, BOUNDS_KEY: (0.0, self.most)}

    def within(self, most: float) -> "TokenBudget":
        """With the largest ratio lowered to ``most``."""
        return replace(self, most=min(self.most, most))


@dataclass(frozen=True)
class AutoRatio:
    """One of two ratios for each image: the lower for images with fine detail, such as text.

    Two levels, so that images of like content get equal counts. More levels did not answer better;
    see docs/accuracy.md.

    Attributes:
        least, most: The two ratios.
    """

    least: float
    most: float
    header = RATIO_HEADER
    needs_detail = True

    def __str__(self) -> str:
        return AUTO

    def ratio(self, num_tokens: int, dense_share: float | None) -> float:
        assert dense_share is not None
        return self.least if dense_share >= FINE_SHARE else self.most

    def processor_kwargs(self) -> dict[str, object]:
        return {RATIO_KEY: AUTO, BOUNDS_KEY: (self.least, self.most)}

    def within(self, least: float, most: float) -> "AutoRatio":
        """With both ratios raised to ``least`` and lowered to ``most``; ``most`` wins."""
        return AutoRatio(min(max(self.least, least), most), min(max(self.most, least), most))


def auto_of(settings: PruningSettings) -> AutoRatio:
    """``auto`` with the operator's bounds, which ``max_pruning_ratio`` limits."""
    bounds = settings.auto
    return AutoRatio(bounds.min, bounds.max).within(0.0, settings.max_pruning_ratio)


def parse_amount(settings: PruningSettings, value: object, *, name: str = RATIO_KEY) -> Amount:
    """Validate a ratio or ``auto`` that a request sent.

    Args:
        settings: The operator's settings.
        value: A JSON number, or text.
        name: Name of the value in the error message.

    Raises:
        ValueError: If ``value`` is neither.
    """
    if isinstance(value, str) and value.strip(" \t") == AUTO:
        return auto_of(settings)
    try:
        return FixedRatio(settings.parse_ratio(value, name=name))
    except ValueError as error:
        raise ValueError(f"{error}. {AUTO!r} chooses a ratio for each image") from None


def parse_budget(
    settings: PruningSettings, value: object, *, name: str = BUDGET_KEY
) -> TokenBudget:
    """Validate a budget that a request sent.

    Raises:
        ValueError: If ``value`` is no integer of at least 1, as a JSON number or as text.
    """
    tokens = value
    if isinstance(value, str) and value.strip(" \t").isdecimal() and len(value) <= 12:
        tokens = int(value)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens < 10**12:
        raise ValueError(
            f"{name} must be an integer of at least 1: visual tokens kept of each image, averaged "
            f"over the decoder's layers; got {quote(value)}"
        )
    return TokenBudget(tokens, settings.max_pruning_ratio)


def default_amount(settings: PruningSettings) -> Amount:
    """What a request gets that asks for nothing."""
    return parse_amount(settings, settings.default_ratio)


def amount_of(settings: PruningSettings, processor_kwargs: Mapping[str, object]) -> Amount:
    """What the processor keywords of a request ask for, or the default.

    Raises:
        ValueError: If it is invalid.
    """
    bounds = processor_kwargs.get(BOUNDS_KEY)
    if BUDGET_KEY in processor_kwargs and RATIO_KEY in processor_kwargs:
        raise ValueError(f"send {RATIO_KEY} or {BUDGET_KEY}, not both")
    if BUDGET_KEY in processor_kwargs:
        budget = parse_budget(settings, processor_kwargs[BUDGET_KEY])
        return budget if bounds is None else budget.within(_parse_bounds(settings, bounds)[1])
    if RATIO_KEY not in processor_kwargs:
        return default_amount(settings)
    amount = parse_amount(settings, processor_kwargs[RATIO_KEY])
    if isinstance(amount, AutoRatio) and bounds is not None:
        return AutoRatio(*_parse_bounds(settings, bounds))
    return amount


def _parse_bounds(settings: PruningSettings, bounds: object) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"{BOUNDS_KEY} must be two ratios; got {quote(bounds)}")
    least, most = (settings.parse_ratio(bound, name=BOUNDS_KEY) for bound in bounds)
    return least, most
