"""The exit status of a server whose engine died."""

import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)


def exit_nonzero_when_dead(engine_client: Any) -> None:
    """Make vLLM's shutdown exit with status 1 if the engine died before the shutdown.

    When an engine dies, vLLM 0.32 closes the HTTP server and exits with status 0, so supervisors
    that restart on failure do not restart it. vLLM calls ``shutdown`` in both cases. After a signal
    the engine still works; after a death it is marked as failed. A shutdown also marks the engine
    as failed, so only the first call counts.
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
