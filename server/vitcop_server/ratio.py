"""The pruning ratio of one request: from the header, the body, or the operator's default."""

from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

from vitcop_server.errors import RequestError
from vitcop_server.route_rules import MAX_HEADER
from vitcop_vllm.pruning.settings import RATIO_HEADER, RATIO_KEY, PruningSettings


class AcceptedRatio(NamedTuple):
    """The ratio of a request.

    Attributes:
        ratio: The ratio.
        is_named: Whether the request names it; otherwise it is the default of that moment.
    """

    ratio: float
    is_named: bool = False


def accepted_ratio(
    settings: PruningSettings,
    header_values: Sequence[str],
    body_value: object,
    alias: float | None = None,
    *,
    default: float | None = None,
    max_values: Sequence[str] = (),
) -> AcceptedRatio:
    """The ratio of a request, or the default if the request names none.

    Args:
        settings: The operator's settings: default and largest ratio.
        header_values: Every ``X-Pruning-Ratio`` header of the request, in order.
        body_value: The body's ``pruning_ratio``; JSON ``null`` is the same as no field.
        alias: The ratio in the model's name; header and body override it.
        default: Replaces the operator's default.
        max_values: Every ``X-Pruning-Max`` header. The default is lowered to it.

    Raises:
        RequestError: If a value is not a ratio in range, if a header is repeated, if header and
            body differ, or if the request names a ratio above its own maximum.
    """
    named = _named_ratio(settings, header_values, body_value)
    if named is None:
        named = alias
    largest = 1.0
    if max_values:
        largest = _header_ratio(settings, max_values, MAX_HEADER, largest)
    if named is None:
        return AcceptedRatio(min(settings.default_ratio if default is None else default, largest))
    if named > largest:
        raise RequestError(
            f"the request asks for ratio {ratio_text(named)}, and its header {MAX_HEADER} allows "
            f"{ratio_text(largest)} at most: leave out the header, or ask for less",
            param=MAX_HEADER,
        )
    return AcceptedRatio(named, is_named=True)


def _named_ratio(
    settings: PruningSettings, header_values: Sequence[str], body_value: object
) -> float | None:
    from_header = from_body = None
    if header_values:
        from_header = _header_ratio(settings, header_values, RATIO_HEADER)
    if body_value is not None:
        from_body = _parse(settings, body_value, RATIO_KEY)
    if from_header is None:
        return from_body
    if from_body is not None and from_body != from_header:
        raise RequestError(
            f"header {RATIO_HEADER} is {ratio_text(from_header)} but the body's {RATIO_KEY} is "
            f"{ratio_text(from_body)}: send one of them, or the same "
            "ratio in both",
            param=RATIO_KEY,
        )
    return from_header


def ratio_text(ratio: float) -> str:
    """The shortest decimal that reads back as ``ratio``, never with an exponent."""
    return format(Decimal(repr(ratio)), "f")


def _header_ratio(
    settings: PruningSettings, values: Sequence[str], name: str, largest: float | None = None
) -> float:
    if len(values) > 1:
        largest = settings.max_pruning_ratio if largest is None else largest
        raise RequestError(
            f"header {name} must be sent once, with a decimal number from 0 to {largest:g}; it was "
            f"sent {len(values)} times",
            param=name,
        )
    # Proxies join repeated headers with commas. A comma is never part of a ratio, so this fails.
    return _parse(settings, values[0], name, largest)


def _parse(
    settings: PruningSettings, value: object, param: str, largest: float | None = None
) -> float:
    name = param if param == RATIO_KEY else f"header {param}"
    try:
        return settings.parse_ratio(value, name=name, largest=largest)
    except ValueError as error:
        raise RequestError(str(error), param=param) from error
