"""The counts of a picture travel in its identity.

vLLM names a processed picture by a hash: key of the processor cache, of the encoder
cache and of every KV block the picture touches. We end that name with the picture's
counts. So each process that sees a request knows its plan, from data vLLM never strips,
and two ratios of one picture can never be taken for each other.
"""

from collections.abc import Iterable
from typing import Protocol

from vitcop_vllm.pruning.plan import RequestPlan, VisualSpan, VisualTokenCounts

_SEPARATOR = "@"


class Placeholders(Protocol):
    """Where a picture's tokens stand in the prompt: vLLM's ``PlaceholderRange``."""

    @property
    def offset(self) -> int: ...

    @property
    def length(self) -> int: ...


class Feature(Protocol):
    """A picture of a request: vLLM's ``MultiModalFeatureSpec``."""

    @property
    def identifier(self) -> str: ...

    @property
    def mm_position(self) -> Placeholders: ...


def tag_identifier(mm_hash: str, counts: VisualTokenCounts) -> str:
    """A picture's hash with its counts at the end."""
    return f"{mm_hash}{_SEPARATOR}{counts.encode()}"


def counts_of_identifier(identifier: str) -> VisualTokenCounts:
    """The counts a picture's identity ends with.

    Whatever a client chose as the picture's ``uuid`` stands before the last separator.

    Raises:
        RuntimeError: If there are none: the picture passed another processor than ours.
    """
    try:
        return VisualTokenCounts.decode(identifier.rpartition(_SEPARATOR)[2])
    except ValueError as error:
        raise RuntimeError(
            f"picture {identifier!r} was processed without visual token counts"
        ) from error


def _counts_of_feature(feature: Feature) -> VisualTokenCounts:
    """Counts that fit the prompt: those told, or all tokens of a picture not processed by us.

    Engines also take prompts that were processed elsewhere. An error here would stop them
    for every request; such a picture simply has as many tokens as placeholders.
    """
    length = feature.mm_position.length
    try:
        counts = counts_of_identifier(feature.identifier)
    except RuntimeError:
        return VisualTokenCounts.unpruned(length)
    return counts if counts.stages[0] == length else VisualTokenCounts.unpruned(length)


def plan_request(features: Iterable[Feature]) -> RequestPlan | None:
    """Plan of a request with these pictures; ``None`` where nothing is pruned."""
    plan = RequestPlan(
        tuple(
            VisualSpan(feature.mm_position.offset, _counts_of_feature(feature))
            for feature in features
        )
    )
    return plan if plan.is_pruned else None
