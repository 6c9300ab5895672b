"""A default ratio that follows load: the more requests wait, the more visual tokens it drops."""

from argparse import Namespace

from vitcop_server.settings import ElasticSettings
from vitcop_vllm.pruning.amount import AutoRatio, default_amount
from vitcop_vllm.pruning.settings import PruningSettings

LEVELS = 4
"""Ratios above the operator's default, the last of which is ``to``.

Caches of prefixes and of encoder outputs hold an image once per ratio. With few ratios, requests
find what others have computed.
"""


def ratios_of(default: float, to: float) -> tuple[float, ...]:
    """``default``, then :data:`LEVELS` ratios up to ``to`` at equal distances."""
    steps = [default + (to - default) * level / LEVELS for level in range(1, LEVELS)]
    # Three digits are short in headers. Close to its neighbours a step may equal one of them.
    return (default, *(min(max(round(step, 3), default), to) for step in steps), to)


def least_ratio(pruning: PruningSettings) -> float:
    """The operator's default ratio, or the lower one of ``auto``."""
    amount = default_amount(pruning)
    return amount.least if isinstance(amount, AutoRatio) else amount.ratio(1, None)


class ElasticRatio:
    """The default ratio as a function of the load so far. It reads no clock.

    With ``waiting: [a, b]``, level 0 is the operator's default; level 1 begins at a + 1 waiting
    requests and the last at b, at equal distances. The level rises at once to what the load asks
    for. It falls by one after the load has asked for less during ``fall_seconds``.

    Attributes:
        ratios: The ratio of each level.
        level: The current level.
    """

    def __init__(self, default: float, settings: ElasticSettings) -> None:
        self.ratios = ratios_of(default, settings.to)
        self.level = 0
        self._settings = settings
        self._since = 0.0
        """When the load last asked for the current level, or the level last fell."""

    def update(self, waiting: int, now: float) -> float:
        """The ratio at time ``now``, in seconds, while ``waiting`` requests wait."""
        wanted = self._wanted_level(waiting)
        if wanted < self.level:
            elapsed = int((now - self._since) / self._settings.fall_seconds)
            fallen = min(elapsed, self.level - wanted)
            self.level -= fallen
            self._since += fallen * self._settings.fall_seconds
        if wanted >= self.level:
            self.level, self._since = wanted, now
        return self.ratios[self.level]

    def _wanted_level(self, waiting: int) -> int:
        low, high = self._settings.waiting
        if waiting <= low:
            return 0
        if waiting >= high:
            return LEVELS
        return 1 + (LEVELS - 1) * (waiting - low - 1) // (high - low - 1)


def check_elastic(
    elastic: ElasticSettings, pruning: PruningSettings, args: Namespace, api_servers: int
) -> None:
    """Refuse settings that contradict each other, and servers that do not know their load.

    Args:
        elastic: The settings of the section ``server.elastic``.
        pruning: The settings of pruning.
        args: Arguments of vLLM's command line.
        api_servers: Number of API server processes.

    Raises:
        ValueError: If there is something to refuse; the message says what to change.
    """
    _, high = elastic.waiting
    queue = args.max_num_queued_reqs
    default = least_ratio(pruning)
    if not default < elastic.to <= pruning.max_pruning_ratio:
        raise ValueError(
            f"server.elastic.to {elastic.to} must be above the default ratio "
            f"{default} and not above pruning.max_pruning_ratio "
            f"{pruning.max_pruning_ratio}"
        )
    if api_servers > 1:
        raise ValueError(
            f"server.elastic needs one API server, but there would be {api_servers}, and the "
            "engine reports its load to one of them only: set --api-server-count 1"
        )
    if args.enable_elastic_ep:
        raise ValueError(
            "server.elastic would lose the engine's statistics when the number of engines "
            "changes: leave out --enable-elastic-ep"
        )
    if args.disable_log_stats:
        raise ValueError(
            "server.elastic reads the engine's statistics: leave out --disable-log-stats"
        )
    if queue is not None and queue <= high:
        raise ValueError(
            f"--max-num-queued-reqs {queue} refuses requests before {high} wait: raise it, or "
            "lower the second number of server.elastic.waiting"
        )
