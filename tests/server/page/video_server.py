"""The server of ``grid_server``, whose model also takes videos. It has no weights."""

import base64
import json
import tempfile
from typing import Any

import cv2
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from tests.server.page.grid_server import choose, grid_app
from vitcop_server import routes
from vitcop_server.explain import explain_image
from vitcop_server.preview import Preview
from vitcop_vllm.pruning.identity import explained_identifier, tag_identifier
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import RATIO_HEADER

READ_PER_SECOND = 2
"""Frames that the loader reads of a second, as vLLM's does. The encoder joins two of them."""


class Video:
    """A video of a request, as the loader reads it.

    Attributes:
        size: Width and height.
        times: When the frames that are read are shown, in seconds.
    """

    def __init__(self, url: str) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(base64.b64decode(url.partition(",")[2]))
            file.flush()
            reader = cv2.VideoCapture(file.name)
            num_frames = 0
            while (read := reader.read())[0]:
                num_frames += 1
                height, width = read[1].shape[:2]
        fps = reader.get(cv2.CAP_PROP_FPS)
        step = round(fps / READ_PER_SECOND)
        self.size = width, height
        self.times = [number / fps for number in range(0, num_frames, step)]


def counts_of_frames(
    preview: Preview, size: tuple[int, int], num_read: int, ratio: float
) -> list[VisualTokenCounts]:
    """Counts of each frame, as the encoder computes them. The first one keeps more tokens."""
    ratios = [ratio / 2, *[ratio] * ((num_read + 1) // 2 - 1)]
    return [preview.counts(*size, of_frame) for of_frame in ratios]


def explain_frame(
    preview: Preview, size: tuple[int, int], counts: VisualTokenCounts, number: int
) -> dict[str, Any]:
    name = explained_identifier("request", number, size, tag_identifier("abc", counts))
    return explain_image(preview, name, choose(counts, seed=number))


def plan_of(preview: Preview, size: tuple[int, int], num_read: int, ratio: float) -> dict[str, Any]:
    counts = counts_of_frames(preview, size, num_read, ratio)
    plan = preview.plan_fields(*size, ratio)
    stages = [
        stage | {"tokens": sum(frame.stages[number] for frame in counts)}
        for number, stage in enumerate(plan["stages"])
    ]
    encoder = sum(frame.encoder for frame in counts)
    return plan | {"frames": len(counts), "encoder_tokens": encoder, "stages": stages}


def video_app(*, knows_times: bool = True, **settings: Any) -> FastAPI:
    """An application whose model takes images and videos."""
    app, images = FastAPI(), grid_app(**settings)
    app.state = images.state
    preview: Preview = app.state.pruning_preview

    def video_of(body: dict[str, Any]) -> Video | None:
        part = body["messages"][0]["content"][0]
        return Video(part["video_url"]["url"]) if part["type"] == "video_url" else None

    @app.get("/v1/pruning/config")
    async def config(raw_request: Request) -> dict[str, Any]:
        return await routes.config(raw_request) | {"takes_videos": True}

    @app.get("/v1/pruning/plan")
    async def plan(
        raw_request: Request,
        ratio: str,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
    ) -> Any:
        if frames is None or width is None or height is None:
            return await routes.plan(raw_request, ratio, width, height)
        return plan_of(preview, (width, height), frames, float(ratio))

    @app.post("/v1/pruning/explain")
    async def explain(body: dict[str, Any], raw_request: Request) -> Any:
        video = video_of(body)
        assert video is not None
        ratio = float(raw_request.headers[RATIO_HEADER])
        counts = counts_of_frames(preview, video.size, len(video.times), ratio)
        frames = [
            explain_frame(preview, video.size, of_frame, number)
            | {"times": video.times[2 * number :][:2] if knows_times else None}
            for number, of_frame in enumerate(counts)
        ]
        width, height = video.size
        videos = [{"width": width, "height": height, "frames": frames}]
        return {"completion": {}, "images": [], "videos": videos}

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any], raw_request: Request) -> StreamingResponse:
        video = video_of(body)
        assert video is not None
        ratio = float(raw_request.headers[RATIO_HEADER])
        counts = counts_of_frames(preview, video.size, len(video.times), ratio)
        usage = preview.model.usage_fields(counts, num_frames=len(counts))
        events = (
            f"data: {json.dumps(event)}\n\n"
            for event in ({"choices": [{"delta": {"content": "Left"}}]}, {"usage": usage})
        )
        return StreamingResponse(events, media_type="text/event-stream")

    app.router.routes.extend(images.router.routes)
    return app
