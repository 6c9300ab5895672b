"""CORS: response headers that pages of other origins may read."""

from argparse import Namespace

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitcop_vllm.pruning.amount import BUDGET_HEADER
from vitcop_vllm.pruning.settings import RATIO_HEADER

EXPOSED_HEADERS = (RATIO_HEADER, BUDGET_HEADER, "X-Request-Id", "Retry-After")


def expose_headers(args: Namespace) -> None:
    """Add :class:`ExposeHeaders` through vLLM's ``--middleware``, which runs outside its CORS."""
    args.middleware = [*args.middleware, f"{ExposeHeaders.__module__}.{ExposeHeaders.__qualname__}"]


class ExposeHeaders:
    """Adds ``Access-Control-Expose-Headers`` to answers that another origin may read.

    vLLM has flags for allowed origins and request headers (``--allowed-origins``), but none for
    exposed response headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_exposed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if "access-control-allow-origin" in headers:
                    headers.append("Access-Control-Expose-Headers", ", ".join(EXPOSED_HEADERS))
            await send(message)

        await self.app(scope, receive, send_exposed)
