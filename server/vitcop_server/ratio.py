"""The pruning ratio of one request: from the header, the body, or the operator's default."""

from collections.abc import Sequence
from decimal import Decimal

from vitcop_server.errors import RequestError
from vitcop_vllm.pruning.settings import RATIO_HEADER, RATIO_KEY, PruningSettings


def accepted_ratio(
    settings: PruningSettings,
    header_values: Sequence[str],
    body_value: object,
    default: float | None = None,
) -> float:
    """The ratio of a request, or the default if the request has none.

    Args:
        settings: The operator's settings: default and largest ratio.
        header_values: Every ``X-Pruning-Ratio`` header of the request, in order.
        body_value: The body's ``pruning_ratio``; JSON ``null`` is the same as no field.
        default: Replaces the operator's default.

    Raises:
        RequestError: If a value is not a ratio in range, if there are several headers, or if
            header and body differ.
    """
    from_header = _header_ratio(settings, header_values) if header_values else None
    from_body = None if body_value is None else _parse(settings, body_value, RATIO_KEY)
    if from_header is None:
        if from_body is not None:
            return from_body
        return settings.default_ratio if default is None else default
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


def _header_ratio(settings: PruningSettings, values: Sequence[str]) -> float:
    if len(values) > 1:
        raise RequestError(
            f"header {RATIO_HEADER} must be sent once, with a decimal number from 0 to "
            f"{settings.max_pruning_ratio:g}; it was sent {len(values)} times",
            param=RATIO_HEADER,
        )
    # Proxies join repeated headers with commas. A comma is never part of a ratio, so this fails.
    return _parse(settings, values[0], RATIO_HEADER)


def _parse(settings: PruningSettings, value: object, param: str) -> float:
    name = f"header {param}" if param == RATIO_HEADER else param
    try:
        return settings.parse_ratio(value, name=name)
    except ValueError as error:
        raise RequestError(str(error), param=param) from error
