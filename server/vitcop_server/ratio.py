"""How much of its images one request drops: from headers, body, model name, or the default."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from vitcop_server.errors import RequestError
from vitcop_server.route_rules import MAX_HEADER
from vitcop_vllm.pruning.amount import (
    BUDGET_HEADER,
    BUDGET_KEY,
    Amount,
    AutoRatio,
    FixedRatio,
    TokenBudget,
    parse_amount,
    parse_budget,
    ratio_text,
)
from vitcop_vllm.pruning.settings import RATIO_HEADER, RATIO_KEY, PruningSettings

T = TypeVar("T")


class Asked(NamedTuple):
    """What a request says about its ratio, unchecked.

    Attributes:
        ratio_headers: Every ``X-Pruning-Ratio`` header, in order.
        ratio_field: The body's ``pruning_ratio``; JSON ``null`` is the same as no field.
        alias: The amount in the model's name; headers and body override it.
        budget_headers: Every ``X-Pruning-Budget`` header.
        budget_field: The body's ``pruning_budget``.
        max_headers: Every ``X-Pruning-Max`` header.
    """

    ratio_headers: Sequence[str] = ()
    ratio_field: object = None
    alias: Amount | None = None
    budget_headers: Sequence[str] = ()
    budget_field: object = None
    max_headers: Sequence[str] = ()


class Accepted(NamedTuple):
    """What a request gets.

    Attributes:
        amount: How much of its images is dropped.
        is_raised: Whether load has raised it.
    """

    amount: Amount
    is_raised: bool = False


def accept(
    settings: PruningSettings, asked: Asked, default: Amount, least: float = 0.0
) -> Accepted:
    """What a request gets, or the default if it asks for nothing.

    Args:
        settings: The operator's settings, with the largest ratio.
        asked: What the request says.
        default: The operator's default.
        least: Load raises the default, and the ratios of ``auto``, to this ratio. ``X-Pruning-Max``
            limits it.

    Raises:
        RequestError: If a value is invalid, if a header is repeated, if header and body differ, if
            there are a ratio and a budget, or if the request names a ratio above its own maximum.
    """
    named = _named(settings, asked)
    largest = 1.0
    if asked.max_headers:
        largest = _header(
            asked.max_headers,
            MAX_HEADER,
            lambda value, name: settings.parse_ratio(value, name=name, largest=1.0),
        )
    if isinstance(named, FixedRatio):
        if named.value > largest:
            raise RequestError(
                f"the request asks for ratio {named}, and its header {MAX_HEADER} allows "
                f"{ratio_text(largest)} at most: leave out the header, or ask for less",
                param=MAX_HEADER,
            )
        return Accepted(named)
    if isinstance(named, TokenBudget):
        return Accepted(named.within(largest))
    amount = _limited(named or default, 0.0, largest)
    raised = _limited(named or default, least, largest)
    return Accepted(raised, raised != amount)


def _limited(amount: Amount, least: float, most: float) -> Amount:
    """A default, or ``auto``, with a ratio of ``least`` to ``most``; ``most`` wins."""
    if isinstance(amount, AutoRatio):
        return amount.within(least, most)
    assert isinstance(amount, FixedRatio)
    return FixedRatio(min(max(amount.value, least), most))


def _named(settings: PruningSettings, asked: Asked) -> Amount | None:
    ratio = _from_either(
        (asked.ratio_headers, RATIO_HEADER),
        (asked.ratio_field, RATIO_KEY),
        lambda value, name: parse_amount(settings, value, name=name),
    )
    budget = _from_either(
        (asked.budget_headers, BUDGET_HEADER),
        (asked.budget_field, BUDGET_KEY),
        lambda value, name: parse_budget(settings, value, name=name),
    )
    if ratio is not None and budget is not None:
        raise RequestError(
            f"the request has a ratio, {ratio}, and a budget, {budget}: send one of them",
            param=BUDGET_KEY,
        )
    return ratio or budget or asked.alias


def _from_either(
    headers: tuple[Sequence[str], str],
    field: tuple[object, str],
    parse: Callable[[object, str], T],
) -> T | None:
    """The value of a header or of a body field, each given with its name."""
    (values, header), (value, key) = headers, field
    from_header = _header(values, header, parse) if values else None
    from_body = None if value is None else _parse(value, key, key, parse)
    if from_header is None:
        return from_body
    if from_body is not None and from_body != from_header:
        raise RequestError(
            f"header {header} is {from_header} but the body's {key} is {from_body}: send one of "
            "them, or the same in both",
            param=key,
        )
    return from_header


def _header(values: Sequence[str], header: str, parse: Callable[[object, str], T]) -> T:
    if len(values) > 1:
        raise RequestError(
            f"header {header} must be sent once; it was sent {len(values)} times", param=header
        )
    # Proxies join repeated headers with commas. A comma is never part of a value, so this fails.
    return _parse(values[0], f"header {header}", header, parse)


def _parse(value: object, name: str, param: str, parse: Callable[[object, str], T]) -> T:
    try:
        return parse(value, name)
    except ValueError as error:
        raise RequestError(str(error), param=param) from error
