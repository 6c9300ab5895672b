"""A process whose engine died must not exit as if all were well."""

import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)


def exit_nonzero_when_dead(engine_client: Any) -> None:
    """Make vLLM's shutdown end the process with status 1 if the engine died before it.

    After an engine's death vLLM 0.32 closes the HTTP server and returns normally, status 0, and
    supervisors that restart on failure leave the service down. vLLM calls ``shutdown`` exactly
    where the difference can be told: on a signal the engine is still well, after a death it
    is not. A shutdown leaves the engine marked dead, so only the first call counts.
    """
    stock_shutdown = engine_client.shutdown
    first_call = True

    def shutdown(timeout: float | None = None) -> None:
        nonlocal first_call
        died = first_call and engine_client.errored
        first_call = False
        stock_shutdown(timeout=timeout)
        if died:
            logger.error("The engine died: exiting with status 1.")
            sys.exit(1)

    engine_client.shutdown = shutdown
