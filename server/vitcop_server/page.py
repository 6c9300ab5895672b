"""The page at ``/ui``: asks about an image twice and shows which visual tokens were kept.

One file of HTML, CSS and JavaScript, and a few sample images; all are read once, when a server
attaches the page, and answered from memory. The samples are scenes of the demo model's world, made
by ``make_scene(default_rng([77, seed]), kind="sign")`` with seeds 48, 20, 42 and 52, the third
widened so that the processor crops it, the first two with fewer colours to be small.
"""

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.routing import Route

from vitcop_server.errors import error_body

_FOLDER = Path(__file__).parent


def _inline_sources(html: str, tag: str) -> str:
    """CSP sources for each inline ``tag``: its hash, so that nothing else of the kind runs."""
    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    ]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def content_security_policy(html: str) -> str:
    """A policy under which the page runs its own script, speaks to its server, and no more.

    Trusted types are on and none is defined: the script could not turn text into markup if it
    tried.
    """
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_inline_sources(html, 'script')}",
            f"style-src {_inline_sources(html, 'style')}",
            "img-src 'self' data: blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _route(path: str, body: bytes, media_type: str, policy: str) -> Route:
    """Answers ``path`` with ``body``, or with 304 to a client that has it already."""
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {
        "ETag": etag,
        "Cache-Control": "no-cache",  # Kept, but asked for again: an update shows at once.
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    async def answer(request: Request) -> Response:
        if not request.app.state.pruning_server_settings.page:
            return JSONResponse(error_body("server.page is off", "NotFoundError", 404), 404)
        known = re.findall(r'"[^"]*"', request.headers.get("if-none-match", ""))
        if etag in known:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media_type, headers=headers)

    return Route(path, answer, methods=["GET"], include_in_schema=False)


def _routes() -> Iterator[Route]:
    html = (_FOLDER / "page.html").read_text(encoding="utf-8")
    yield _route("/ui", html.encode(), "text/html", content_security_policy(html))
    for image in sorted((_FOLDER / "samples").glob("*.png")):
        policy = "default-src 'none'"
        yield _route(f"/ui/samples/{image.name}", image.read_bytes(), "image/png", policy)


def attach_page(app: FastAPI) -> None:
    """Serve the page at ``/ui`` and its sample images below, unless ``server.page`` is off."""
    app.router.routes.extend(_routes())
