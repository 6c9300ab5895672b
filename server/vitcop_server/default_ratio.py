"""The ratio, right now, of requests that name none."""

import asyncio
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vitcop_server.elastic import ElasticRatio, check_elastic, least_ratio
from vitcop_server.metrics import DEFAULT_RATIO
from vitcop_server.preview import Preview
from vitcop_server.settings import ElasticSettings
from vitcop_vllm.pruning.amount import FixedRatio, default_amount
from vitcop_vllm.pruning.settings import PruningSettings


class DefaultRatio:
    """What requests get that ask for nothing. Load does not change it.

    Attributes:
        amount: The operator's default.
    """

    def __init__(self, settings: PruningSettings) -> None:
        self.amount = default_amount(settings)
        self._ratio = least_ratio(settings)
        DEFAULT_RATIO.set(self._ratio)

    def least(self) -> float:
        """The ratio to which load raises a request that arrives now; 0 if it raises none."""
        return 0.0

    @contextmanager
    def rendering(self) -> Iterator[None]:
        """Inside the ``with`` block a request is rendered: the engine does not know it yet."""
        yield


class ElasticDefault(DefaultRatio, AggregateStatLoggerBase):
    """A default ratio that follows the number of waiting requests.

    A request waits from its arrival until the engine runs it. The waiting requests are those that
    are rendered here and those that vLLM has not finished, less those that the engines ran in
    their last steps. vLLM's own gauge of waiting requests lacks the first kind, and those that
    arrived during a step.

    vLLM calls this object, one of its loggers, with the statistics of each step.
    """

    def __init__(
        self, pruning: PruningSettings, settings: ElasticSettings, engine_client: Any
    ) -> None:
        super().__init__(pruning)
        self._elastic = ElasticRatio(self._ratio, settings)
        self._fall_seconds = settings.fall_seconds
        self._engine_client = engine_client
        self._num_rendering = 0
        self._num_running: dict[int, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def least(self) -> float:
        ratio = self._elastic.update(self.num_waiting, time.monotonic())
        if ratio != self._ratio:
            self._ratio = ratio
            DEFAULT_RATIO.set(ratio)
        if self._elastic.level and self._timer is None:
            # Otherwise an idle server would show its last ratio until the next request.
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._fall_seconds, self._fall)
        return ratio if self._elastic.level else 0.0

    @property
    def ratios(self) -> tuple[float, ...]:
        """The default ratio, and all to which :meth:`least` may raise it, ascending."""
        return self._elastic.ratios

    @property
    def num_waiting(self) -> int:
        """Number of waiting requests; each of the ``n`` answers to a request is one."""
        unfinished: int = self._engine_client.get_num_unfinished_requests()
        return max(0, self._num_rendering + unfinished - sum(self._num_running.values()))

    @contextmanager
    def rendering(self) -> Iterator[None]:
        self._num_rendering += 1
        try:
            yield
        finally:
            self._num_rendering -= 1

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Note an engine's running requests after a step; vLLM calls this."""
        if scheduler_stats is not None:
            self._num_running[engine_idx] = scheduler_stats.num_running_reqs
            self.least()

    def log_engine_initialized(self) -> None:
        """Do nothing: vLLM requires the method."""

    def _fall(self) -> None:
        self._timer = None
        self.least()


def default_ratio_of(
    engine_client: Any, preview: Preview, settings: ElasticSettings | None, args: Namespace
) -> DefaultRatio:
    """The default ratio of a running server.

    Raises:
        ValueError: If ``settings`` do not suit the server; the message says what to change.
    """
    pruning = preview.model.settings
    if settings is None:
        return DefaultRatio(pruning)
    # In one process, vLLM replaces the number by None.
    check_elastic(settings, pruning, args, args.api_server_count or 1)
    elastic = ElasticDefault(pruning, settings, engine_client)
    _check_steps(preview, elastic)
    engine_client.logger_manager.stat_loggers.append(elastic)
    return elastic


def _check_steps(preview: Preview, elastic: ElasticDefault) -> None:
    """Check that a step has room for the largest image at the lowest raised ratio.

    An image that is not pruned may be computed in several steps, a pruned one may not. So load
    must not turn a good request into one that is refused.
    """
    size = preview.info.get_image_size_with_most_features()
    ratio = elastic.ratios[1]
    tokens = preview.counts(size.width, size.height, FixedRatio(ratio)).stages[0]
    limit = preview.info.span_limit
    if tokens > limit:
        raise ValueError(
            f"with server.elastic, the largest image would keep {tokens} tokens in Stage I at "
            f"ratio {ratio}, and a step holds {limit}: set --max-num-batched-tokens {tokens} or "
            "more, or raise pruning.default_ratio"
        )
