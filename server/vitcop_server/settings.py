"""Settings of the server, beside vLLM's flags."""

from argparse import Namespace
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from vitcop_vllm.pruning.settings import (
    Frozen,
    Positive,
    Ratio,
    RatioOrAuto,
    format_validation_error,
)

SERVER_KEY = "server"
"""Name of the settings, in a YAML file and in ``--additional-config``."""

Count = Annotated[int, Field(ge=1, strict=True)]


class ElasticSettings(Frozen):
    """A default ratio that follows load: see :class:`vitcop_server.elastic.ElasticRatio`.

    Attributes:
        to: The highest default ratio.
        waiting: Numbers of waiting requests: up to the first the ratio is ``default_ratio``, from
            the second on it is ``to``.
        fall_seconds: Time that the load must be lower before the ratio falls by one level.
    """

    to: Annotated[Ratio, Field(gt=0.0)]
    waiting: tuple[Annotated[int, Field(ge=0, strict=True)], Count]
    fall_seconds: Positive = 5.0

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        low, high = self.waiting
        if low >= high:
            raise ValueError(f"waiting must be two ascending numbers; got [{low}, {high}]")
        return self


class ServerSettings(Frozen):
    """Limits on requests, and routes beside vLLM's.

    Attributes:
        aliases: Ratios, or ``auto``, for which ``/v1/models`` lists ``NAME@RATIO``, for tools that
            choose a model but send no headers. Such a name works with any ratio, listed or not.
        page: Whether ``/ui`` is served.
        explain: Whether ``POST /v1/pruning/explain`` is served, which returns the visual tokens
            that each stage keeps. Such a request misses all caches and costs a call to the workers.
        elastic: Raises the ratio of requests that name none while others wait.
        image_ids: Whether clients may set an image's ``uuid``. It is a key of caches that all
            clients share: a client that knows it gets answers about that image.
        max_body_bytes: Maximum size of a request body.
        max_image_pixels: Maximum width times height of an image.
        max_aspect_ratio: Maximum of longest side over shortest side. LLaVA's processor enlarges
            a thin image until its shortest side fills the model's input; Qwen's refuses more
            than 200.
        max_video_frames: Maximum number of frames in a video file.
        max_video_pixels: Maximum of width times height times the number of frames that are read
            of a video. They take 3 bytes each in memory.
    """

    aliases: tuple[RatioOrAuto, ...] = ()
    page: bool = True
    explain: bool = False
    elastic: ElasticSettings | None = None
    image_ids: bool = False
    max_body_bytes: Count = 64 * 2**20
    max_image_pixels: Count = 25_000_000
    max_video_frames: Count = 20_000
    max_video_pixels: Count = 2**28
    max_aspect_ratio: Annotated[Positive, Field(ge=1.0)] = 16.0


def server_settings_of(app: Any) -> ServerSettings:
    """The settings of a running ``app``; the defaults if it has none."""
    settings: ServerSettings = getattr(
        getattr(app, "state", None), "pruning_server_settings", ServerSettings()
    )
    return settings


def server_settings(args: Namespace) -> ServerSettings:
    """Settings in the additional config of vLLM's command line.

    Raises:
        ValueError: If a setting is wrong; the message names each wrong setting.
    """
    additional: Any = args.additional_config or {}
    try:
        return ServerSettings.model_validate(additional.get(SERVER_KEY, {}))
    except ValidationError as error:
        raise ValueError(format_validation_error(error, SERVER_KEY)) from None
