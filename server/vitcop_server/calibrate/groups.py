"""Groups of conversations that each get a ratio, and what was found for them."""

from collections.abc import Sequence
from dataclasses import dataclass

from vitcop_server.calibrate.agreement import Agreement, Measure
from vitcop_server.calibrate.bounds import lower_bound, trials_needed
from vitcop_server.calibrate.folder import Conversation
from vitcop_server.calibrate.measurement import Measurement
from vitcop_server.calibrate.search import Found, search

ALL = "all"


@dataclass(frozen=True)
class Group:
    """Conversations of one kind of image, of one use, or of all."""

    kind: str
    use: str
    members: tuple[Conversation, ...]

    @property
    def num_images(self) -> int:
        return len({one.hashes for one in self.members})


@dataclass(frozen=True)
class Goal:
    """What a ratio must keep.

    Attributes:
        keep: Share of images that agree, below 1.
        confidence: Of the bound that proves it.
    """

    keep: float
    confidence: float

    @property
    def images_needed(self) -> int:
        """Images needed for a proof if all of them agree."""
        return trials_needed(self.keep, self.confidence)

    def bound(self, agreement: Agreement) -> float:
        return lower_bound(agreement.agreeing, agreement.images, self.confidence)

    def is_observed(self, agreement: Agreement) -> bool:
        return agreement.share >= self.keep

    def is_proven(self, agreement: Agreement) -> bool:
        return self.bound(agreement) >= self.keep


@dataclass(frozen=True)
class Result:
    """What was found for a group by a measure.

    Attributes:
        proven: The highest ratio whose bound reaches the goal; 0 if none does.
        observed: The highest ratio at which the images that were asked reach it.
        curve: Agreement at each ratio at which the group was asked, ascending.
    """

    group: Group
    measure: Measure
    proven: Found
    observed: Found
    curve: dict[float, Agreement]

    def count(self, ratio: float) -> str:
        """Agreement at a ratio in words; empty if it is not known."""
        found = self.curve.get(ratio)
        return f"{found.agreeing}/{found.images}" if found else ""


def make_groups(conversations: Sequence[Conversation]) -> list[Group]:
    """All conversations, each kind, each use, and each use of each kind; none of them twice."""
    kinds = [ALL, *dict.fromkeys(one.kind for one in conversations)]
    uses = [ALL, *dict.fromkeys(one.use for one in conversations)]
    groups: dict[tuple[Conversation, ...], Group] = {}
    for kind in kinds:
        for use in uses:
            members = tuple(
                one for one in conversations if kind in (ALL, one.kind) and use in (ALL, one.use)
            )
            if members:
                groups.setdefault(members, Group(kind, use, members))
    return list(groups.values())


def measure_groups(
    measurement: Measurement,
    groups: Sequence[Group],
    measures: Sequence[Measure],
    grid: Sequence[float],
    goal: Goal,
    *,
    scan: bool = False,
) -> list[Result]:
    """Search the grid for each group by each measure.

    The results are found in a second round, from all that was asked in the first.

    Raises:
        ServerError: If a request fails.
    """
    results = []
    for round_ in ("ask", "conclude"):
        for group in groups:
            for measure in measures:
                result = _search(measurement, group, measure, grid, goal, scan=scan)
                if round_ == "conclude":
                    results.append(result)
    return results


def _search(
    measurement: Measurement,
    group: Group,
    measure: Measure,
    grid: Sequence[float],
    goal: Goal,
    *,
    scan: bool,
) -> Result:
    def agreement(ratio: float) -> Agreement:
        return measurement.agreement(measure, ratio, group.members)

    def known() -> list[float]:
        return [ratio for ratio in grid if measurement.is_measured(measure, ratio, group.members)]

    observed = search(grid, lambda r: goal.is_observed(agreement(r)), known(), scan=scan)
    proven = Found(0.0, True)
    if group.num_images >= goal.images_needed:
        proven = search(grid, lambda r: goal.is_proven(agreement(r)), known(), scan=scan)
    curve = {ratio: agreement(ratio) for ratio in (0.0, *known())}
    return Result(group, measure, proven, observed, curve)
