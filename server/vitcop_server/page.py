"""The page at ``/ui``: asks a question twice, and shows which visual tokens were kept.

The page is one file of HTML, CSS and JavaScript, with a few sample images and a sample video. The
server reads all files once, when it attaches the page, and answers from memory. The images are
scenes for the demo model, made by ``make_scene(default_rng([77, seed]), kind="sign")`` with seeds
48, 20, 42 and 52. The third is widened, so that the processor crops it. The first two have fewer
colours, which makes them small. ``python -m demo.moving FILE`` makes the video, which the page
offers for models that take videos.
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

_SAMPLE_TYPES = {".png": "image/png", ".webm": "video/webm"}


def _inline_sources(html: str, tag: str) -> str:
    """CSP sources of all inline ``tag`` elements: their hashes. The browser runs no others."""
    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    ]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def content_security_policy(html: str) -> str:
    """A policy that allows the page its own script and requests to its own server only.

    Trusted types are required and none is defined, so the script cannot turn text into markup.
    """
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_inline_sources(html, 'script')}",
            f"style-src {_inline_sources(html, 'style')}",
            "img-src 'self' data: blob:",
            "media-src blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _route(path: str, body: bytes, media_type: str, policy: str) -> Route:
    """A route that answers with ``body``, or with 304 if the client has it cached."""
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {
        "ETag": etag,
        "Cache-Control": "no-cache",  # Cached, but revalidated: an update shows at once.
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    async def answer(request: Request) -> Response:
        if not request.app.state.pruning_server_settings.page:
            return JSONResponse(
                error_body("the page is off: set server.page to true", "NotFoundError", 404), 404
            )
        known = re.findall(r'"[^"]*"', request.headers.get("if-none-match", ""))
        if etag in known:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media_type, headers=headers)

    return Route(path, answer, methods=["GET"], include_in_schema=False)


def _routes() -> Iterator[Route]:
    html = (_FOLDER / "page.html").read_text(encoding="utf-8")
    yield _route("/ui", html.encode(), "text/html", content_security_policy(html))
    for suffix, media_type in _SAMPLE_TYPES.items():
        for sample in sorted((_FOLDER / "samples").glob(f"*{suffix}")):
            policy = "default-src 'none'"
            yield _route(f"/ui/samples/{sample.name}", sample.read_bytes(), media_type, policy)


def attach_page(app: FastAPI) -> None:
    """Serve the page at ``/ui`` and its samples under it, unless ``server.page`` is off."""
    app.router.routes.extend(_routes())
