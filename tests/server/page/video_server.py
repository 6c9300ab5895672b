"""The server of ``grid_server``, whose model also takes videos. It has no weights."""

import base64
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import cv2
from fastapi import FastAPI, Request

from tests.server.grids import NUM_LAYERS, GridInfo
from tests.server.page.grid_server import Model, app_of, choose
from vitcop_server.preview import Preview
from vitcop_vllm.models.layout import VideoLayout
from vitcop_vllm.pruning.amount import Amount, FixedRatio
from vitcop_vllm.pruning.grids import count_tokens
from vitcop_vllm.pruning.identity import explained_identifier, frame_names, tag_identifier
from vitcop_vllm.pruning.plan import VideoCounts, plan_video
from vitcop_vllm.pruning.settings import RATIO_HEADER, PruningSettings

READ_PER_SECOND = 2
"""Frames of a second that the loader reads, as vLLM's does. The encoder joins two of them."""


class VideoInfo(GridInfo):
    """Attributes:
    explained_layouts: Layouts of videos that are explained, by identifier.
    """

    def __init__(self, settings: PruningSettings) -> None:
        super().__init__(settings)
        self.explained_layouts: dict[str, VideoLayout] = {}

    def video_layout(self, num_frames: int, width: int, height: int, *_: Any) -> VideoLayout:
        return VideoLayout((num_frames + 1) // 2, self.layout(width, height).grids, 0)

    def video_counts(self, layout: VideoLayout, amount: Amount) -> VideoCounts:
        tokens = count_tokens(layout.grids)
        ratio = amount.ratio(tokens, None)
        return plan_video(self.settings, ratio, NUM_LAYERS, tokens, layout.num_frames)


def read_video(url: str) -> tuple[tuple[int, int], list[float]]:
    """Width and height, and when the frames that the loader reads are shown, in seconds."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(base64.b64decode(url.partition(",")[2]))
        file.flush()
        video = cv2.VideoCapture(file.name)
        frames = []
        while (read := video.read())[0]:
            frames.append(read[1])
        fps = video.get(cv2.CAP_PROP_FPS)
    height, width = frames[0].shape[:2]
    step = round(fps / READ_PER_SECOND)
    return (width, height), [number / fps for number in range(0, len(frames), step)]


class VideoModel(Model):
    """Takes images and videos, whose first frame keeps more tokens than the others.

    Attributes:
        knows_times: Whether explanations say when a frame is shown.
    """

    def __init__(self, *, knows_times: bool = True) -> None:
        super().__init__(compare_frames=True)
        of_images: Preview = self.preview
        info = VideoInfo(of_images.model.settings)
        model = replace(of_images.model, takes_videos=True)
        self.preview = replace(of_images, model=model, info=info)
        self.knows_times = knows_times

    def video_counts(
        self, url: str, raw_request: Request
    ) -> tuple[VideoCounts, VideoLayout, tuple[int, int]]:
        size, times = read_video(url)
        info = self.preview.info
        layout = info.video_layout(len(times), *size)
        if self.knows_times:
            layout = replace(
                layout, times=tuple(tuple(times[at : at + 2]) for at in range(0, len(times), 2))
            )
        counts = info.video_counts(layout, FixedRatio(float(raw_request.headers[RATIO_HEADER])))
        return counts, layout, size

    async def record(self, part: Mapping[str, Any], raw_request: Request) -> str:
        if part["type"] != "video_url":
            return await super().record(part, raw_request)
        (first, others), layout, size = self.video_counts(part["video_url"]["url"], raw_request)
        tag = tag_identifier("abc", others, layout.num_frames, None if first == others else first)
        name = explained_identifier("request", 0, size, tag)
        self.preview.info.explained_layouts[name] = layout
        for number, frame in enumerate(frame_names(name, layout.num_frames)):
            self.records[frame] = choose(others if number else first, seed=number)
        return name

    async def usage(self, part: Mapping[str, Any], raw_request: Request) -> dict[str, Any]:
        if part["type"] != "video_url":
            return await super().usage(part, raw_request)
        (first, others), layout, _ = self.video_counts(part["video_url"]["url"], raw_request)
        frames = [first, *[others] * (layout.num_frames - 1)]
        return self.preview.model.usage_fields(frames, num_frames=len(frames))


def video_app(*, knows_times: bool = True) -> FastAPI:
    """An application with page, routes and answers of a model that takes videos."""
    return app_of(VideoModel(knows_times=knows_times))
